"""The table of engines: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cushion_deploy.engines.base import Engine
from cushion_deploy.engines.onnxruntime.compile import OnnxRuntimeCpu
from cushion_deploy.engines.tensorrt.compile import TensorRt
from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD
from cushion_deploy.errors import MissingDependency, unknown_choice

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (OnnxRuntimeCpu(), TensorRt(RTX), TensorRt(STANDARD))}


@dataclass(frozen=True)
class Availability:
    """An engine on this machine.

    Attributes:
        name: of the engine.
        compiles: whether it can compile here.
        version: of its library; empty where that is not there.
        gpus: devices that it could run on, see :class:`~cushion_deploy.engines.probe.Probe`.
        note: what it can do here, or what to install.
    """

    name: str
    compiles: bool
    version: str
    gpus: tuple[str, ...]
    note: str


def availabilities() -> tuple[Availability, ...]:
    """Return what every engine of the table can do here."""
    return tuple(map(_availability, ENGINES.values()))


def _availability(engine: Engine) -> Availability:
    missing = why_missing(engine)
    if missing is not None:
        return Availability(engine.name, False, "", (), f"{missing.message}; {missing.hint}")
    gpus = engine.gpus()
    note = "compiles and runs here"
    if gpus is not None and not gpus:
        note = "compiles here, ahead of time; running needs an NVIDIA GPU"
    return Availability(engine.name, True, engine.version(), gpus or (), note)


def choose_engines(names: Sequence[str] | None) -> list[Engine]:
    """Return the engines to compile for: those asked for, or every one that is available here.

    Raises:
        UsageError: an unknown name, with the valid ones.
        MissingDependency: an engine was asked for that cannot compile here, with the install line.
    """
    if names is None:
        return [engine for engine in ENGINES.values() if why_missing(engine) is None]
    chosen = []
    for name in names:
        if name not in ENGINES:
            raise unknown_choice("engine", name, sorted(ENGINES))
        ENGINES[name].require()
        chosen.append(ENGINES[name])
    return chosen


def why_missing(engine: Engine) -> MissingDependency | None:
    """Return why an engine cannot compile here, or None where it can."""
    try:
        engine.require()
    except MissingDependency as e:
        return e
    return None
