"""Doctor without a model: what is installed here, which engines and devices are present, and what is missing."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cushion_deploy.core.host import cpu_description
from cushion_deploy.core.libraries import library_versions, missing_of_extra
from cushion_deploy.engines.readiness import Readiness, driver_gpus, readiness
from cushion_deploy.store.manifest import tool_version

SCHEMA = 1
"""Version of the JSON form. It rises when a field is removed or changes its meaning, not when one is added."""
JETSON = Path("/etc/nv_tegra_release")
"""Present on Jetson modules, whose TensorRT comes from JetPack's own packages."""


@dataclass(frozen=True)
class Task:
    """Something that a user may want to do, and whether this environment has what it needs.

    Attributes:
        name: short name, stable.
        what: the task in words.
        ready: whether everything is installed; None if that is unknown, because cushion-deploy runs from a source tree
            that is not installed, or was before it had this task.
        missing: the distributions that are missing or too old.
        install: the command that installs them; empty if the task is ready.
    """

    name: str
    what: str
    ready: bool | None
    missing: tuple[str, ...] = ()
    install: str = ""


@dataclass(frozen=True)
class Environment:
    """What was found on this machine, without a model.

    Attributes:
        version: version of cushion-deploy.
        python: implementation and version.
        platform: operating system, architecture and C library.
        processor: model of the processor, and the number of logical cores.
        gpus: NVIDIA GPUs of the driver, such as ``sm86 NVIDIA GeForce RTX 3090``.
        libraries: version of every library that cushion-deploy may use; None for one that is not installed.
        engines: what every engine can do here.
        tasks: what can be done with what is installed.
        warnings: one sentence each.
    """

    version: str
    python: str
    platform: str
    processor: str
    gpus: tuple[str, ...]
    libraries: Mapping[str, str | None]
    engines: tuple[Readiness, ...]
    tasks: tuple[Task, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict, with the version of its form first."""
        return {"schema": SCHEMA, **asdict(self)}


TASKS: Mapping[str, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        "run": ("run a bundle on the CPU", ("cpu", "chat")),
        "serve": ("serve a bundle", ("cpu", "serve")),
        "hub": ("fetch and push bundles on the Hugging Face hub", ("hub",)),
        "build": ("build a bundle", ("cpu", "build", "report", "chat")),
        "eval": ("evaluate zero-shot tasks", ("eval",)),
        "openvino": ("run a bundle on OpenVINO", ("openvino",)),
        "gpu": ("run a bundle on the GPU with ONNX Runtime", ("gpu",)),
        "compile-rtx": ("compile plans for TensorRT-RTX", ("rtx",)),
        "run-rtx": ("run plans of TensorRT-RTX", ("rtx", "cuda")),
        "tensorrt": ("compile and run plans of TensorRT", ("tensorrt", "cuda")),
    }
)
"""Each task in words, and the extras that it needs."""


def examine_environment() -> Environment:
    """Return what this machine and this environment have. No library is imported but those that engines are tried with.

    Drivers and the libraries of NVIDIA are tried in child processes. Nothing is raised for what is missing.
    """
    libraries, engines, gpus = library_versions(), readiness(), driver_gpus()
    return Environment(
        version=tool_version(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        processor=cpu_description(),
        gpus=gpus,
        libraries=libraries,
        engines=engines,
        tasks=tuple(_task(name, libraries) for name in TASKS),
        warnings=tuple(_warnings(libraries, engines, gpus)),
    )


def _task(name: str, libraries: Mapping[str, str | None]) -> Task:
    what, extras = TASKS[name]
    missing: list[str] = []
    for extra in extras:
        lacking = missing_of_extra(extra)
        if lacking is None:
            return Task(name, what, None)
        # Both distributions contain the module onnxruntime, and only one of them may be installed.
        replaced = {"onnxruntime"} if libraries["onnxruntime-gpu"] else set()
        missing += [str(each) for each in lacking if each.name not in replaced and str(each) not in missing]
    return Task(name, what, not missing, tuple(missing), _install(name, extras, libraries) if missing else "")


def _install(name: str, extras: tuple[str, ...], libraries: Mapping[str, str | None]) -> str:
    command = f"pip install 'cushion-deploy[{','.join(extras)}]'"
    if name == "gpu" and libraries["onnxruntime"]:
        return f"pip uninstall -y onnxruntime && {command}"
    if name == "tensorrt" and JETSON.exists():
        others = "pip install 'cushion-deploy[cuda]'"
        return f"sudo apt-get install python3-libnvinfer && {others}, in a venv made with --system-site-packages"
    return command


def _warnings(libraries: Mapping[str, str | None], engines: tuple[Readiness, ...], gpus: tuple[str, ...]) -> list[str]:
    torch = libraries["torch"] or ""
    problems = {
        "no engine can run a bundle here: pip install 'cushion-deploy[cpu]'": not any(each.runs for each in engines),
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: pip uninstall -y onnxruntime "
        "onnxruntime-gpu, then install one of them": bool(libraries["onnxruntime"] and libraries["onnxruntime-gpu"]),
        f"torch {torch} is a build for the CPU, so builds do not use the GPU of this machine: install torch for CUDA": (
            bool(gpus) and torch.endswith("+cpu")
        ),
    }
    return [text for text, present in problems.items() if present]
