"""Plans of the fake TensorRT, and the fixture that puts it in place of the real one."""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeCuda, FakeTensorRt

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.tensorrt.profiles import Limits, profile_shapes

LIMITS = CompileOptions(max_batch=3, max_context=60, max_prefill=8)


def plan_of(graph: ExportedGraph, options: CompileOptions = LIMITS) -> bytes:
    """Return a plan of the fake for a graph, with the profiles that a compilation would give it."""
    shapes = profile_shapes(graph.contract, Limits.of(options, graph.contract))
    return json.dumps({"onnx": str(graph.path), "profiles": list(shapes.values())}).encode()


def close(found: Any, wanted: Any) -> None:
    """Compare logits of a plan in half precision with those of ONNX Runtime."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    """Put a device that checks every call in place of CUDA and TensorRT."""
    module = FakeTensorRt(FakeCuda())
    fakes: dict[str, Any] = {"cuda.bindings.runtime": module.cuda, "tensorrt_rtx": module, "tensorrt": module}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *a, **k: fakes.get(name) or real(name, *a, **k))
    return module
