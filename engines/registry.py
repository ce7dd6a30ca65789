"""The table of engines: one line each."""

from __future__ import annotations

from collections.abc import Sequence

from cushion_deploy.engines.base import Engine
from cushion_deploy.engines.onnxruntime import OnnxRuntimeCpu
from cushion_deploy.engines.tensorrt_rtx import TensorRtRtx
from cushion_deploy.errors import MissingDependency, unknown_choice

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (OnnxRuntimeCpu(), TensorRtRtx())}


def choose_engines(names: Sequence[str] | None) -> list[Engine]:
    """Return the engines to compile for: those asked for, or every one that is available here.

    Raises:
        UsageError: an unknown name, with the valid ones.
        MissingDependency: an engine was asked for that cannot compile here, with the install line.
    """
    if names is None:
        return [engine for engine in ENGINES.values() if engine.unavailable() is None]
    chosen = []
    for name in names:
        if name not in ENGINES:
            raise unknown_choice("engine", name, sorted(ENGINES))
        engine = ENGINES[name]
        reason = engine.unavailable()
        if reason is not None:
            raise MissingDependency(reason, hint=f"pip install 'cushion-deploy[{engine.extra}]'")
        chosen.append(engine)
    return chosen
