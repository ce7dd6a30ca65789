"""The engine stage: compile a graph for each engine asked for, in a build or for a bundle that is there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.progress import elapsed
from cushion_deploy.engines.base import CompileOptions, Engine
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UntrustedArtifact, UsageError, require_modules
from cushion_deploy.pipeline.prepare import read_deployed, require_model_of
from cushion_deploy.pipeline.reporting import engine_row
from cushion_deploy.pipeline.stages import plan_form, plan_graph
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.document import REPORT_JSON, read_report
from cushion_deploy.report.document import Engine as EngineRow
from cushion_deploy.report.write import write_report
from cushion_deploy.runtime.bundle import Bundle, verify_graph
from cushion_deploy.runtime.engine import read_engine
from cushion_deploy.store import hash_file, place, publish, recover, require_publishable, staging_area

_OF_A_PLAN = re.compile(r"float16 graph|graph with a static cache")
"""Rungs of the ladder that look at the graph behind a plan."""
LINKED_BYTES = 64 << 20
"""An engine's file of this size or more shares its bytes with the work folder; smaller ones may be edited: copied."""


def compile_options(recipe: Recipe, targets: Sequence[str], allow_float_linears: int) -> CompileOptions:
    """Return what engines are asked for; the limits are the recipe's."""
    plans = recipe.tensorrt
    limits = plans.max_batch, plans.max_context, plans.max_prefill
    return CompileOptions(tuple(targets), *limits, allow_float_linears=allow_float_linears)


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

    A graph of another floating-point type, or with a static cache, is exported again from the original model; nothing
    else needs that.

    Args:
        ws: the bundle's recipe; its model is the original.
        bundle: verified.
        engine, options: what to compile.
        output: a new folder, or the bundle itself; another bundle there is replaced.

    Raises:
        UsageError: the model at hand is another one, or something else is at ``output``.
        UntrustedArtifact: the bundle's graph is not what its export wrote, or the bundle changed meanwhile.
        MissingDependency: what writes the report is not installed.
        CheckFailed: see :meth:`Engine.compile`; nothing is published then.
    """
    # Engines are kept by the digest that the graph's own description claims.
    verify_graph(bundle.graph)
    engine.check(options)
    if bundle.path.resolve() in output.resolve().parents:
        raise UsageError(f"{output} lies inside of the bundle", hint="give a folder beside it")
    require_modules("matplotlib", "jinja2")  # the report is written anew, after minutes of compiling
    recover(output)
    require_publishable(output)
    with ws.store.lock():
        graph = bundle.graph
        deployed = read_deployed(ws, bundle.path, graph)
        if plan_form(ws, deployed, engine, graph.contract, options.max_context) != (graph.contract.dtype, 0):
            require_model_of(ws, bundle.path)
            graph = plan_graph(ws, deployed, engine, graph, options.max_context)
        artifact, folder = compile_engine(ws, engine, graph, options)
        own = f"engines/{engine.name}/"
        with staging_area(output) as staged:
            for name, entry in bundle.manifest.files.items():
                if not name.startswith(own):
                    (staged / name).parent.mkdir(parents=True, exist_ok=True)
                    place(bundle.path / name, staged / name, link=False)
                    # Compiling took its time: what is published is what was verified before it.
                    if hash_file(staged / name) != entry.sha256:
                        raise UntrustedArtifact(f"{name} changed meanwhile", hint="run `cushion-deploy verify`")
            place_engine(artifact, folder, staged)
            _tell(artifact, staged / "report", checked=graph.digest in _graphs_checked(bundle))
            # What stands in the recipe of a bundle is what its plans were made with.
            recipe = dict(bundle.manifest.recipe)
            if "limits" in artifact.details:
                recipe["tensorrt"] = ws.recipe.tensorrt.model_dump(mode="json")
            publish(staged, output, recipe, bundle.manifest.parents)
    return artifact


def _graphs_checked(bundle: Bundle) -> set[str]:
    """Return the digests of the graphs that a bundle's engines were compiled from: what its report says parity of."""
    names = (name for name in ENGINES if f"engines/{name}/engine.json" in bundle.manifest.files)
    return {bundle.graph.digest, *(read_engine(bundle, name).lineage.graph for name in names)}


def _tell(artifact: EngineArtifact, folder: Path, *, checked: bool) -> None:
    """Put an engine into the report in ``folder``, in the place of the same engine.

    Checks of graphs behind plans are left out where this plan was compiled from one that they did not see.
    """
    report = read_report(folder / REPORT_JSON)
    others = [engine for engine in report.engines if engine.engine != artifact.engine]
    rows = (*others, EngineRow.model_validate(engine_row(artifact)))
    parity = tuple(row for row in report.parity if checked or not _OF_A_PLAN.search(row.rung))
    write_report(report.model_copy(update={"engines": rows, "parity": parity}), folder)
