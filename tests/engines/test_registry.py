"""Engines by name: those asked for, or those that are there."""

from __future__ import annotations

import pytest

from cushion_deploy.engines.onnxruntime import engine as onnxruntime_engine
from cushion_deploy.engines.onnxruntime.engine import OnnxRuntime
from cushion_deploy.engines.openvino.engine import OpenVino
from cushion_deploy.engines.probe import Probe
from cushion_deploy.engines.registry import ENGINES, choose_engines, find_engine
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.errors import ExitCode, MissingDependency, UsageError


@pytest.fixture
def only_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let OpenVINO and TensorRT-RTX be missing."""

    def missing(engine: TensorRt) -> None:
        raise MissingDependency("the library is not there", hint=engine.flavour.install)

    def no_openvino(engine: OpenVino) -> None:
        raise MissingDependency("OpenVINO is not there", hint="install it")

    monkeypatch.setattr(OpenVino, "require", no_openvino)
    monkeypatch.setattr(OnnxRuntime, "require", lambda self: None)
    monkeypatch.setattr(TensorRt, "require", missing)


def test_names_are_the_keys() -> None:
    assert {"onnxruntime", "openvino", "tensorrt-rtx"} <= set(ENGINES)
    assert all(engine.name == name for name, engine in ENGINES.items())


@pytest.mark.usefixtures("only_onnxruntime")
def test_without_names_every_available_engine_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [e.name for e in choose_engines(None)] == ["onnxruntime"]
    monkeypatch.setattr(TensorRt, "require", lambda self: None)
    assert [e.name for e in choose_engines(None)] == ["onnxruntime", "tensorrt-rtx", "tensorrt"]


@pytest.mark.usefixtures("only_onnxruntime")
def test_a_graph_for_a_gpu_is_compiled_where_it_could_run_or_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [e.name for e in choose_engines(["onnxruntime-cuda"])] == ["onnxruntime-cuda"]
    monkeypatch.setattr(OnnxRuntime, "gpus", lambda self: ("sm90 a GPU",) if self.provider.device else None)
    assert [e.name for e in choose_engines(None)] == ["onnxruntime", "onnxruntime-cuda"]
    # A graph with a dequantized embedding takes more space than the bundle's.
    assert [e.name for e in choose_engines(["onnxruntime-tensorrt"])] == ["onnxruntime-tensorrt"]


def test_a_gpu_counts_only_for_the_build_that_could_run_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Probe("onnxruntime", "1.31", ("sm90 a GPU",))
    monkeypatch.setattr(onnxruntime_engine, "probe", lambda module: gpu)
    for installed, found in ((False, ()), (True, gpu.gpus)):
        monkeypatch.setattr(onnxruntime_engine, "is_installed", lambda name, here=installed: here)
        assert find_engine("onnxruntime-cuda").gpus() == found
    assert find_engine("onnxruntime").gpus() is None


@pytest.mark.usefixtures("only_onnxruntime")
def test_names_are_kept_in_order() -> None:
    assert [e.name for e in choose_engines(["onnxruntime"])] == ["onnxruntime"]
    assert choose_engines([]) == []


@pytest.mark.usefixtures("only_onnxruntime")
def test_an_unknown_engine_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="unknown engine 'tensorflow'") as caught:
        choose_engines(["onnxruntime", "tensorflow"])
    assert caught.value.exit_code == ExitCode.USAGE
    assert caught.value.hint == f"choose one of: {', '.join(sorted(ENGINES))}"


@pytest.mark.usefixtures("only_onnxruntime")
def test_an_engine_that_is_missing_ends_with_the_install_line() -> None:
    with pytest.raises(MissingDependency, match="the library is not there") as caught:
        choose_engines(["onnxruntime", "tensorrt-rtx"])
    assert caught.value.exit_code == ExitCode.MISSING == 3
    assert caught.value.hint == "pip install 'cushion-deploy[rtx]'"
