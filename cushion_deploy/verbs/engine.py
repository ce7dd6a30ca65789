"""Engine: a bundle with one engine more."""

from __future__ import annotations

import re
from pathlib import Path

from cushion_deploy.core.engine_artifact import ENGINE_FILE, EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.base import CompileOptions, Engine
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UntrustedArtifact, UsageError, require_modules
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.document import REPORT_JSON, read_report
from cushion_deploy.report.document import Engine as EngineRow
from cushion_deploy.report.write import write_report
from cushion_deploy.runtime.bundle import Bundle, verify_graph
from cushion_deploy.runtime.engine import read_engine
from cushion_deploy.stages.base import Given, Node
from cushion_deploy.stages.compile import Compile
from cushion_deploy.stages.export import engine_form
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.quantization import read_quantization
from cushion_deploy.stages.report import engine_row
from cushion_deploy.stages.run import Run
from cushion_deploy.store import hash_file, place, publish, recover, require_publishable, staging_area
from cushion_deploy.verbs.parity import pipeline_of_bundle

_OF_A_PLAN = re.compile(r"float16 graph|graph with a static cache")
"""Rungs of the ladder that look at the graph behind a plan."""


def add_engine(
    recipe: Recipe, run: Run, bundle: Bundle, engine: Engine, options: CompileOptions, output: Path
) -> EngineArtifact:
    """Publish a bundle with one engine more, or with another one in the place of the same engine.

    A graph of another floating-point type, or with a static cache, is exported again from the original model; nothing
    else needs that.

    Args:
        recipe: the bundle's; its model is the original.
        run: the work folder.
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
    with run.store.lock():
        compiled = run.get(Compile.of(_engine_graph(recipe, bundle, engine, options), engine.name, options))
        artifact, own = compiled.artifact, f"engines/{engine.name}/"
        with staging_area(output) as staged:
            _copy(bundle, staged, besides=own)
            compiled.place(staged)
            checked = artifact.lineage.graph in _graphs_checked(bundle)
            _update_report(artifact, staged / "report", checked=checked)
            # The recipe of a bundle holds what its plans were made with.
            published = dict(bundle.manifest.recipe)
            if "limits" in artifact.details:
                published["tensorrt"] = recipe.tensorrt.model_dump(mode="json")
            publish(staged, output, published, bundle.manifest.parents)
    return artifact


def _engine_graph(recipe: Recipe, bundle: Bundle, engine: Engine, options: CompileOptions) -> Node[ExportedGraph]:
    """Return the graph to compile: the bundle's own, or one that needs the original model."""
    graph, own = Given(bundle.graph), Pipeline.form_of(recipe)
    form = engine_form(own, engine, recipe.tensorrt.dtype, options.max_context, bundle.graph.contract)
    if form == own:
        return graph
    pipeline = pipeline_of_bundle(recipe, bundle.path)
    quantization = Given(read_quantization(bundle.path, bundle.graph, pipeline.scheme))
    return pipeline.graph(quantization, form)


def _copy(bundle: Bundle, staged: Path, besides: str) -> None:
    """Copy the files of a bundle but those of one engine; raises UntrustedArtifact where one changed."""
    for name, entry in bundle.manifest.files.items():
        if name.startswith(besides):
            continue
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        place(bundle.path / name, staged / name, link=False)
        # Compiling took its time: what is published is what was verified before it.
        if hash_file(staged / name) != entry.sha256:
            raise UntrustedArtifact(f"{name} changed meanwhile", hint="run `cushion-deploy verify`")


def _graphs_checked(bundle: Bundle) -> set[str]:
    """Return the digests of the graphs that a bundle's engines were compiled from: its report has parity of those."""
    names = (name for name in ENGINES if f"engines/{name}/{ENGINE_FILE}" in bundle.manifest.files)
    return {bundle.graph.digest, *(read_engine(bundle, name).lineage.graph for name in names)}


def _update_report(artifact: EngineArtifact, folder: Path, *, checked: bool) -> None:
    """Put an engine into the report in ``folder``, in the place of the same engine.

    Checks of graphs behind plans are left out where this plan was compiled from one that they did not see.
    """
    report = read_report(folder / REPORT_JSON)
    others = [engine for engine in report.engines if engine.engine != artifact.engine]
    rows = (*others, EngineRow.model_validate(engine_row(artifact)))
    parity = tuple(row for row in report.parity if checked or not _OF_A_PLAN.search(row.rung))
    write_report(report.model_copy(update={"engines": rows, "parity": parity}), folder)
