"""The doctor without a model: what is here, what is missing, and the line that installs it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from cushion_deploy.cli.main import run
from cushion_deploy.core.libraries import LIBRARIES, Missing
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.verbs import environment
from cushion_deploy.verbs.environment import TASKS, Environment, examine_environment

ENGINE = {"name", "compiles", "runs", "version", "note"}
TASK = {"name", "what", "ready", "missing", "install"}


@pytest.fixture(scope="module")
def here() -> Environment:
    """Return what the doctor finds on this machine."""
    return examine_environment()


def lacks(monkeypatch: pytest.MonkeyPatch, **missing: tuple[str, ...]) -> None:
    """Let extras lack some distributions, and all others nothing."""
    found = {extra: tuple(Missing(name, ">=1") for name in names) for extra, names in missing.items()}
    monkeypatch.setattr(environment, "missing_of_extra", lambda extra: found.get(extra, ()))


def test_the_versions_are_those_of_the_libraries(here: Environment) -> None:
    assert torch.__version__.startswith(str(here.libraries["torch"]))  # which may add the build, as in +cu130
    assert here.libraries["onnxruntime"] == onnxruntime.__version__
    assert here.libraries["numpy"] == importlib.metadata.version("numpy")
    assert here.python.endswith(platform.python_version())


def test_every_engine_is_listed_and_the_one_that_is_here_runs(here: Environment) -> None:
    engines = {engine.name: engine for engine in here.engines}
    assert list(engines) == list(ENGINES)
    assert engines["onnxruntime"].runs
    assert engines["onnxruntime"].note == ""
    offered = onnxruntime.get_available_providers()
    assert engines["onnxruntime-cuda"].runs is ("CUDAExecutionProvider" in offered)
    # Their graphs are made without a GPU.
    assert engines["onnxruntime-cuda"].compiles
    assert engines["onnxruntime-tensorrt"].compiles
    for engine in here.engines:
        assert engine.runs is (engine.note == ""), "what does not run says what it needs"


def test_the_shape_of_its_json_is_stable(capsys: Any) -> None:
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert set(found) == {
        *("schema", "version", "python", "platform", "processor"),
        *("gpus", "libraries", "engines", "tasks", "warnings"),
    }
    assert list(found["libraries"]) == list(LIBRARIES)
    assert all(set(engine) == ENGINE for engine in found["engines"])
    assert all(set(task) == TASK for task in found["tasks"])
    assert [task["name"] for task in found["tasks"]] == list(TASKS)


def test_it_says_so_in_words(capsys: Any, here: Environment) -> None:
    assert run(["doctor"]) == 0
    words = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in words
    assert f"onnxruntime {onnxruntime.__version__}: compiles and runs here" in words
    assert here.processor in words
    assert "examines a model before a build" in words


def test_what_is_missing_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    lacks(monkeypatch, build=("torch", "gguf"), gpu=("onnxruntime-gpu",))
    tasks = {task.name: task for task in examine_environment().tasks}
    assert tasks["build"].missing == ("torch>=1", "gguf>=1")
    assert tasks["build"].install == "pip install 'cushion-deploy[cpu,build,report,chat]'"
    assert (tasks["run"].ready, tasks["run"].install) == (True, "")
    # Both contain the module onnxruntime.
    assert tasks["gpu"].install == "pip uninstall -y onnxruntime && pip install 'cushion-deploy[gpu]'"
    assert run(["doctor"]) == 0
    assert "build a bundle: missing torch>=1, gguf>=1\n    pip install" in capsys.readouterr().out


def test_onnxruntime_gpu_serves_where_onnxruntime_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks(monkeypatch, cpu=("onnxruntime",))
    libraries = {**dict.fromkeys(LIBRARIES), "onnxruntime-gpu": "1.23"}
    monkeypatch.setattr(environment, "library_versions", lambda: libraries)
    assert next(task for task in examine_environment().tasks if task.name == "run").ready


def test_a_jetson_gets_tensorrt_from_its_own_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lacks(monkeypatch, tensorrt=("tensorrt",))
    monkeypatch.setattr(environment, "JETSON", tmp_path)
    task = next(task for task in examine_environment().tasks if task.name == "tensorrt")
    assert "apt-get install python3-libnvinfer" in task.install
    assert "--system-site-packages" in task.install


def test_what_does_not_fit_together_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = {**dict.fromkeys(LIBRARIES), "torch": "2.13.0+cpu", "onnxruntime": "1.23", "onnxruntime-gpu": "1.23"}
    monkeypatch.setattr(environment, "library_versions", lambda: libraries)
    monkeypatch.setattr(environment, "driver_gpus", lambda: ("sm86 NVIDIA GeForce RTX 3090",))
    monkeypatch.setattr(environment, "readiness", lambda: ())
    found = examine_environment()
    assert found.gpus == ("sm86 NVIDIA GeForce RTX 3090",)
    for words in ("no engine can run", "overwrite each other", "torch 2.13.0+cpu is a build for the CPU"):
        assert any(words in text for text in found.warnings)


@pytest.mark.parametrize("option", ["--device=cpu", "--dtype=fp32", "--set=a=1", "--calib-data=x", "--revision=x"])
def test_options_of_a_model_need_one(option: str, capsys: Any) -> None:
    assert run(["doctor", option]) == 2
    assert f"{option.partition('=')[0]} was given without MODEL" in capsys.readouterr().err
