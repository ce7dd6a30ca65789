"""The engine stage: compile a graph for each engine asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cushion_deploy.engines.base import CompileOptions, Engine
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.progress import elapsed
from cushion_deploy.types import EngineArtifact, ExportedGraph


def engine_stage(engine: Engine) -> str:
    """Return the name of an engine's stage."""
    return f"engine-{engine.name}"


def engine_parents(engine: Engine, graph: str, options: CompileOptions) -> dict[str, Any]:
    """Return what decides a compiled engine, from the digest of its graph."""
    return {"graph": graph, "engine": engine.name, "version": engine.version(), "options": options.key()}


def compile_engine(
    ws: Workspace, engine: Engine, graph: ExportedGraph, options: CompileOptions
) -> tuple[EngineArtifact, Path]:
    """Return the compiled engine and its stage folder."""
    parents = engine_parents(engine, graph.digest, options)

    def make(out: Path) -> None:
        with elapsed(ws.progress, f"compiling for {engine.name}"):
            engine.compile(graph, out, options)

    folder = ws.stage(engine_stage(engine), parents, make)
    return EngineArtifact.from_json(json.loads((folder / "engine.json").read_text())), folder
