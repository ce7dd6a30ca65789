"""The engine stage: compile a graph for each engine asked for."""

from __future__ import annotations

import json
from pathlib import Path

from cushion_deploy.engines.base import CompileOptions, Engine
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.progress import elapsed
from cushion_deploy.types import EngineArtifact, ExportedGraph


def compile_engine(
    ws: Workspace, engine: Engine, graph: ExportedGraph, options: CompileOptions
) -> tuple[EngineArtifact, Path]:
    """Return the compiled engine and its stage folder."""
    parents = {
        "graph": graph.digest,
        "engine": engine.name,
        "version": engine.version(),
        "options": options.key(),
    }

    def make(out: Path) -> None:
        with elapsed(ws.progress, f"compiling for {engine.name}"):
            engine.compile(graph, out, options)

    # A plan may hold every weight twice.
    folder = ws.stage(f"engine-{engine.name}", parents, make, lambda: 2 * graph.size)
    return EngineArtifact.from_json(json.loads((folder / "engine.json").read_text())), folder
