"""What a build would reuse of the work folder, and how much space the rest takes; runs nothing and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cushion_deploy.artifacts import PREFIX_FILE, SCALES_FILE, read_prefix, read_scales
from cushion_deploy.engines.base import CompileOptions, Engine
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.pipeline.compiling import engine_parents, engine_stage
from cushion_deploy.pipeline.limits import longest_prefix
from cushion_deploy.pipeline.stages import calibrate_parents, export_parents, export_stage, search_parents
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.types import Dtype

Kept = dict[str, bool | None]
"""Stage to: kept from an earlier run (True), still to run (False), decided by a result that is not there (None)."""

BYTES_OF_STAGE = {"model": 4, "export": 2, "engine": 2, "parity": 4}
"""Bytes a parameter that a stage writes: float32, INT8 with a float embedding, a plan, the float twin."""
BYTES_OF_BUNDLE = 2
"""The bundle's own copy of the INT8 graph."""


def kept_stages(ws: Workspace, engines: Sequence[Engine], options: CompileOptions) -> Kept:
    """Return, in the order of a build, which of its stages an earlier run has left."""
    names: list[tuple[str, Dtype]] = [("model", "float32")]
    names += [(e.graph_dtype, e.graph_dtype) for e in engines if e.graph_dtype != "float32"]
    graphs = {dtype: name for name, dtype in names}
    searched = bool(longest_prefix(ws.recipe))
    stages = ["model"] if ws.source.kind == "gguf" else []
    stages += ["search"] if searched else []
    stages += ["calibrate" if searched else "calibrate-without-prefix"]
    stages += [*map(export_stage, graphs.values()), *map(engine_stage, engines), "evaluate", "parity"]
    found: Kept = dict.fromkeys(stages)

    def look(stage: str, parents: Mapping[str, Any]) -> Path | None:
        folder = ws.store.holds(stage, ws.key(stage, dict(parents)))
        found[stage] = folder is not None
        return folder

    if "model" in found:
        look("model", {"model": ws.source.digest})
    if not _text_at_hand(ws) or not searched:
        # An empty prefix has the shape of the model, which has to be loaded to know it.
        return found
    try:
        folder = look("search", search_parents(ws))
        if folder is None:
            return found
        prefix = read_prefix(folder / PREFIX_FILE)
        if not prefix.length:
            found = {{"calibrate": "calibrate-without-prefix"}.get(stage, stage): kept for stage, kept in found.items()}
        stage = "calibrate" if prefix.length else "calibrate-without-prefix"
        folder = look(stage, calibrate_parents(ws, prefix.digest))
        if folder is None:
            return found
        scales = read_scales(folder / SCALES_FILE)
        for dtype, name in graphs.items():
            folder = look(export_stage(name), export_parents(ws, prefix.digest, scales.digest, dtype, name))
            if folder is not None:
                graph = str(json.loads((folder / "export.json").read_text(encoding="utf-8"))["digest"])
                for engine in engines:
                    if engine.graph_dtype == dtype:
                        look(engine_stage(engine), engine_parents(engine, graph, options))
    except (UntrustedArtifact, UsageError, OSError, ValueError, KeyError):
        # A damaged result runs again, and what follows it is not known yet: the build itself finds and says it.
        return found
    return found


def space_needed(kept: Kept, parameters: int) -> int:
    """Return the bytes that the stages which are not known to be kept write, with the bundle."""
    missing = [stage for stage, there in kept.items() if not there]
    return parameters * (BYTES_OF_BUNDLE + sum(BYTES_OF_STAGE.get(stage.partition("-")[0], 0) for stage in missing))


def most_parameters(ws: Workspace) -> int:
    """Return the parameters of the model where an earlier run wrote them down; else the most its files can hold."""
    spec = ws.store.holds("tokenizer", ws.key("tokenizer", {"model": ws.source.digest}))
    if spec is not None:
        try:
            return int(json.loads((spec / "spec.json").read_text(encoding="utf-8"))["parameters"])
        except (OSError, ValueError, KeyError, TypeError):
            # Damaged: the build finds it and writes it again; the estimate serves until then.
            return _parameters_by_size(ws)
    return _parameters_by_size(ws)


def _parameters_by_size(ws: Workspace) -> int:
    path = ws.source.path
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    # A GGUF file may spend half a byte on a parameter, a folder at least two.
    return 2 * size if ws.source.kind == "gguf" else size // 2


def _text_at_hand(ws: Workspace) -> bool:
    """Return whether the calibration text is known without running the model."""
    return ws.recipe.calibration.data != "self" or ws.sampled_text_kept()
