"""What every engine can do on this machine, and the GPUs of its driver."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from cushion_deploy.engines.base import Engine
from cushion_deploy.engines.onnxruntime.engine import OnnxRuntime
from cushion_deploy.engines.onnxruntime.settings import import_onnxruntime
from cushion_deploy.engines.probe import probe
from cushion_deploy.engines.registry import ENGINES, why_missing
from cushion_deploy.errors import MissingDependency


@dataclass(frozen=True)
class Readiness:
    """What any engine can do with a bundle on this machine.

    Attributes:
        name: name of the engine.
        compiles: whether it can compile here.
        runs: whether it can run here; a plan also has to be for the GPU of this machine.
        version: version of its library; empty if that is not installed or cannot be used.
        note: what is missing and what installs it; empty if it runs.
    """

    name: str
    compiles: bool
    runs: bool
    version: str
    note: str


def readiness() -> tuple[Readiness, ...]:
    """Return what every engine can do on this machine."""
    return tuple(map(_readiness, ENGINES.values()))


def driver_gpus() -> tuple[str, ...]:
    """Return the GPUs of the driver, ``sm<major><minor> <name>``, whether or not a library that uses them is there."""
    return probe("numpy").gpus  # any module that is always installed: the child reads the driver


def _readiness(engine: Engine) -> Readiness:
    compiles = why_missing(engine) is None
    try:
        version = engine.version()
    except MissingDependency as e:
        return Readiness(engine.name, compiles, False, "", f"{e.message}; {e.hint}")
    try:
        _require_to_run(engine)
    except MissingDependency as e:
        return Readiness(engine.name, compiles, False, version, f"{e.message}; {e.hint}")
    return Readiness(engine.name, compiles, True, version, "")


def _require_to_run(engine: Engine) -> None:
    """Check that an engine whose library is installed can run here; raises MissingDependency if it cannot."""
    if isinstance(engine, OnnxRuntime):
        offered = import_onnxruntime().get_available_providers()
        if engine.provider.name not in offered:
            raise MissingDependency(
                f"this build of onnxruntime has no {engine.provider.name}", hint=engine.provider.install
            )
    elif engine.compiles_to != "plan":
        engine.require()
    elif not engine.gpus():
        raise MissingDependency("there is no NVIDIA GPU here", hint="run the bundle with --engine onnxruntime")
    elif find_spec("cuda") is None or find_spec("cuda.bindings") is None:
        raise MissingDependency("cuda-bindings is not installed", hint="pip install 'cushion-deploy[cuda]'")
