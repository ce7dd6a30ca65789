"""What tests/gpu asserts of ``onnxruntime-cuda`` on a device, here on the CPU provider with a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_text import OnText

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.onnxruntime.compile_graph import compile_graph
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.engines.onnxruntime.settings import CPU, CUDA
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.runtime.bundle import read_graph

HERE = replace(CPU, device="cpu", multiplies_floats=True)


@pytest.fixture(scope="module")
def on_text(tiny_model: TorchRunner) -> OnText:
    """Return the tiny model in static W8A8, with the losses of fake-quant."""
    return OnText.of(tiny_model, (7, 1), windows=4)


@pytest.fixture(scope="module")
def own(on_text: OnText, tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    """Return the graph that ``onnxruntime-cuda`` runs."""
    folder, out = tmp_path_factory.mktemp("graph"), tmp_path_factory.mktemp("own")
    compile_graph(on_text.graph(folder / "float16", "float16"), out, CUDA)
    return read_graph(out)


def test_the_engine_is_within_the_limit_of_the_ladder(on_text: OnText, own: ExportedGraph) -> None:
    assert on_text.check(open_session(own, threads=1, provider=HERE)).passed


def test_so_is_the_graph_of_a_bundle_without_one(on_text: OnText, tmp_path: Path) -> None:
    graph = on_text.graph(tmp_path / "float32", "float32")
    assert on_text.check(open_session(graph, threads=1, provider=HERE)).passed


def test_another_scale_is_not(
    on_text: OnText, own: ExportedGraph, sabotaged: Callable[[ExportedGraph, Any], ExportedGraph]
) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors["head.weight_scales"] *= np.float32(1.5)

    assert not on_text.check(open_session(sabotaged(own, edit), threads=1, provider=HERE)).passed
