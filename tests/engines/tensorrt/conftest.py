"""TensorRT-RTX, a tiny graph to compile, and standard TensorRT as a stand-in around it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from random_llama import export

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.probe import Probe
from cushion_deploy.engines.tensorrt import engine
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraph:
    """Return the exported tiny decoder."""
    return export(tmp_path_factory.mktemp("graph"))


@pytest.fixture
def rtx() -> TensorRt:
    """Return the engine where its library is installed."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is an optional extra: pip install 'cushion-deploy[rtx]'")
    return TensorRt(RTX)


@pytest.fixture
def standard(rtx: TensorRt, monkeypatch: pytest.MonkeyPatch) -> TensorRt:
    """Return standard TensorRT on a device sm86, its library a stand-in around the real parser and builder."""
    stand_in = Path(__file__).parents[2] / "fakes" / "standard"
    monkeypatch.setenv("PYTHONPATH", str(stand_in), prepend=os.pathsep)
    monkeypatch.setattr(engine, "probe", lambda module: Probe(module, "11.0.0.99", ("sm86 NVIDIA A10",)))
    return TensorRt(STANDARD)
