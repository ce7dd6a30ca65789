"""The engine stage: compile a graph for each engine asked for, in a build or for a bundle that is there."""

from __future__ import annotations

import json
from pathlib import Path

from cushion_deploy.engines.base import CompileOptions, Engine
from cushion_deploy.pipeline.prepare import read_deployed, require_model_of
from cushion_deploy.pipeline.stages import export
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.progress import elapsed
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.store import place, publish, recover, require_publishable, staging_area
from cushion_deploy.types import EngineArtifact, ExportedGraph

LINKED_BYTES = 64 << 20
"""An engine's file of this size or more shares its bytes with the work folder; smaller ones may be edited: copied."""


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


def place_engine(artifact: EngineArtifact, folder: Path, bundle: Path) -> None:
    """Put a compiled engine from its stage folder into a bundle that is being written."""
    target = bundle / "engines" / artifact.engine
    target.mkdir(parents=True)
    for name in artifact.files:
        place(folder / name, target / name, link=(folder / name).stat().st_size >= LINKED_BYTES)


def add_engine(ws: Workspace, bundle: Bundle, engine: Engine, options: CompileOptions, output: Path) -> EngineArtifact:
    """Publish a bundle with one engine more, or with another one in the place of the same engine.

    The graph of another floating-point type is exported again from the original model; nothing else needs that.

    Args:
        ws: the bundle's recipe; its model is the original.
        bundle: verified.
        engine, options: what to compile.
        output: new folder, an empty one, or the bundle itself.

    Raises:
        UsageError: the model at hand is another one.
        CheckFailed: see :meth:`Engine.compile`; nothing is published then.
    """
    recover(output)
    require_publishable(output)
    with ws.store.lock():
        graph = bundle.graph
        if graph.contract.dtype != engine.graph_dtype:
            require_model_of(ws, bundle.path)
            deployed = read_deployed(ws, bundle.path, graph)
            graph = export(ws, deployed, dtype=engine.graph_dtype, name=engine.graph_dtype)
        artifact, folder = compile_engine(ws, engine, graph, options)
        own = f"engines/{engine.name}/"
        with staging_area(output) as staged:
            for name in bundle.manifest.files:
                if not name.startswith(own):
                    (staged / name).parent.mkdir(parents=True, exist_ok=True)
                    place(bundle.path / name, staged / name, link=False)
            place_engine(artifact, folder, staged)
            publish(staged, output, bundle.manifest.recipe, bundle.manifest.parents)
    return artifact
