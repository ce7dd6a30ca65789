"""Nodes that a provider leaves to the CPU are counted and named; matrix products there are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from cushion_deploy.engines.onnxruntime.cache_graphs import slice_graph
from cushion_deploy.engines.onnxruntime.load import load_graph
from cushion_deploy.engines.onnxruntime.settings import Provider, SessionSettings
from cushion_deploy.errors import CheckFailed, MissingDependency

# A provider that every build on Linux and Windows has, and that takes no node: the silent fallback, for real.
IDLE = Provider("onnxruntime-azure", "AzureExecutionProvider", "install it")


@pytest.fixture
def idle() -> SessionSettings:
    """Return settings of a session on the provider that takes no node."""
    if IDLE.name not in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {IDLE.name}")
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime cannot tell where nodes run, and is refused")
    return SessionSettings(threads=1, provider=IDLE)


@pytest.fixture
def one_slice(tmp_path: Path) -> Path:
    """Return a graph of one node that multiplies nothing."""
    file = tmp_path / "slice.onnx"
    file.write_bytes(slice_graph("tensor(float)", rank=2, axis=1))
    return file


def test_nodes_left_to_the_cpu_are_counted_and_named(idle: SessionSettings, one_slice: Path) -> None:
    _, placement = load_graph(one_slice, idle)
    assert placement is not None
    assert placement.nodes == {"CPUExecutionProvider": 1}
    assert placement.elsewhere == {"Slice": 1}
    assert placement.words == "1 of 1 nodes not on AzureExecutionProvider: 1 Slice"


def test_matrix_products_on_the_cpu_are_refused(idle: SessionSettings, tiny: Any) -> None:
    with pytest.raises(CheckFailed, match=r"onnxruntime-azure leaves matrix products to the CPU: .* MatMul") as caught:
        tiny.session(provider=IDLE)
    assert "--engine onnxruntime" in caught.value.hint


def test_a_version_that_cannot_tell_is_refused(
    idle: SessionSettings, one_slice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "get_provider_graph_assignment_info"
    owner = next(each for each in onnxruntime.InferenceSession.__mro__ if name in vars(each))
    monkeypatch.delattr(owner, name)
    with pytest.raises(MissingDependency, match="cannot tell which nodes AzureExecutionProvider leaves to the CPU"):
        load_graph(one_slice, idle)


def test_the_cpu_provider_runs_everything_and_says_nothing(one_slice: Path, tiny: Any) -> None:
    assert load_graph(one_slice, SessionSettings(threads=1))[1] is None
    assert tiny.session().remarks == ()
