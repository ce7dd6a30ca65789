"""The table of engines, one line each, and what is available on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cushion_deploy.engines.base import Engine
from cushion_deploy.engines.onnxruntime import settings as providers
from cushion_deploy.engines.onnxruntime.engine import OnnxRuntime
from cushion_deploy.engines.openvino.engine import OpenVino
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD
from cushion_deploy.errors import MissingDependency, unknown_choice

_ENGINES: tuple[Engine, ...] = (
    OnnxRuntime(providers.CPU),
    OnnxRuntime(providers.CUDA),
    OnnxRuntime(providers.TENSORRT),
    OnnxRuntime(providers.TENSORRT_RTX),
    OpenVino(),
    TensorRt(RTX),
    TensorRt(STANDARD),
)
ENGINES: dict[str, Engine] = {engine.name: engine for engine in _ENGINES}
"""Every engine that a bundle can run on."""


@dataclass(frozen=True)
class Availability:
    """What an engine can do on this machine.

    Attributes:
        name: name of the engine.
        compiles: whether it can compile here.
        version: version of its library; empty if that is not installed.
        gpus: GPUs that it could run on, see :class:`~cushion_deploy.engines.probe.Probe`.
        note: what it can do here, or what to install.
    """

    name: str
    compiles: bool
    version: str
    gpus: tuple[str, ...]
    note: str


def find_engine(name: str) -> Engine:
    """Return an engine by name; raises UsageError, with the valid names, if there is none."""
    if name not in ENGINES:
        raise unknown_choice("engine", name, list(ENGINES))
    return ENGINES[name]


def choose_engines(names: Sequence[str] | None) -> list[Engine]:
    """Return the engines to compile for: the named ones, or every one that can compile on this machine.

    A graph of an engine's own takes as much space as the bundle's, so without names it is only compiled where it could
    run, and one with a dequantized embedding, which takes more, only by name.

    Raises:
        UsageError: an unknown name; the hint lists the valid ones.
        MissingDependency: a named engine cannot compile here; the hint is the install command.
    """
    if names is None:
        found = [engine for engine in ENGINES.values() if why_missing(engine) is None]
        return [e for e in found if e.compiles_to != "graph" or (e.gathers_codes and e.gpus())]
    chosen = []
    for name in names:
        if name not in ENGINES:
            raise unknown_choice("engine", name, sorted(ENGINES))
        ENGINES[name].require()
        chosen.append(ENGINES[name])
    return chosen


def availabilities() -> tuple[Availability, ...]:
    """Return what each engine can do on this machine."""
    return tuple(map(_availability, ENGINES.values()))


def why_missing(engine: Engine) -> MissingDependency | None:
    """Return why an engine cannot compile on this machine, or None if it can."""
    try:
        engine.require()
    except MissingDependency as e:
        return e
    return None


def _availability(engine: Engine) -> Availability:
    missing = why_missing(engine)
    if missing is not None:
        return Availability(engine.name, False, "", (), f"{missing.message}; {missing.hint}")
    gpus = engine.gpus()
    note = "compiles and runs here"
    if gpus is not None and not gpus:
        note = "compiles here, ahead of time; running needs an NVIDIA GPU"
    return Availability(engine.name, True, engine.version(), gpus or (), note)
