"""Engine: add a compiled engine to a bundle."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cushion_deploy.core.engine_artifact import ENGINE_FILE, EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.value_range import PlanType, ValueRange
from cushion_deploy.engines.base import CompileOptions, Engine
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import UntrustedArtifact, UsageError, require_modules
from cushion_deploy.modeling.origin import origin_of_card
from cushion_deploy.recipe import Recipe
from cushion_deploy.report import Report
from cushion_deploy.report.card import CARD_NAME, model_card
from cushion_deploy.report.document import REPORT_JSON, read_report
from cushion_deploy.report.document import Engine as EngineRow
from cushion_deploy.report.document import PlanType as PlanTypeRow
from cushion_deploy.report.write import write_report
from cushion_deploy.runtime.bundle import Bundle, verify_graph
from cushion_deploy.runtime.engine import DEFAULT_ENGINE, read_engine
from cushion_deploy.stages.base import Given, Node
from cushion_deploy.stages.compile import Compile
from cushion_deploy.stages.engine_graph import EngineGraph, engine_form, is_same_graph
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.plan_type import has_plan_type
from cushion_deploy.stages.quantization import read_quantization
from cushion_deploy.stages.report import engine_row, plan_type_row
from cushion_deploy.stages.run import Run
from cushion_deploy.store import (
    changed_documents,
    hash_file,
    place,
    publish,
    recover,
    require_publishable,
    staging_area,
)
from cushion_deploy.store.snapshot import is_document
from cushion_deploy.verbs.parity import pipeline_of_bundle

_OF_A_PLAN = re.compile(r"float16 graph|graph with a static cache")
"""Names of the parity rungs that check the graph behind a plan."""


def add_engine(
    recipe: Recipe, run: Run, bundle: Bundle, engine: Engine, options: CompileOptions, output: Path
) -> EngineArtifact:
    """Publish a bundle with an engine added, or with the same engine replaced.

    A graph with another floating-point type or with a static cache is exported again, which needs the original model;
    other graphs do not need it.

    Args:
        recipe: the recipe of the bundle; its model is the original.
        run: the work folder.
        bundle: a verified bundle.
        engine, options: the engine to compile, and its options.
        output: a new folder or the bundle itself; an existing bundle there is replaced.

    Raises:
        UsageError: the given model is not the original, or ``output`` exists and is not a bundle.
        UntrustedArtifact: the bundle's graph is not the one that was exported, or the bundle changed during the run.
        MissingDependency: a package that the report needs is not installed.
        CheckFailed: see :meth:`Engine.compile`; nothing is published.
    """
    # Engines are cached by the digest in the graph's own description, so that has to be verified.
    verify_graph(bundle.graph)
    engine.check(options)
    if bundle.path.resolve() in output.resolve().parents:
        raise UsageError(f"{output} is inside the bundle", hint="give a folder outside it")
    require_modules("matplotlib", "jinja2")  # checked now: the report is written after minutes of compiling
    recover(output)
    require_publishable(output)
    with run.lock():
        graph, plan_type = _engine_graph(recipe, bundle, engine, options)
        compiled = run.get(Compile.of(graph, engine.name, options))
        artifact, own = compiled.artifact, f"engines/{engine.name}/"
        with staging_area(output) as staged:
            _copy(bundle, staged, replaced=own)
            compiled.place(staged)
            checked = artifact.lineage.graph in _graphs_checked(bundle)
            chosen = run.get(plan_type) if plan_type else None
            report = _update_report(artifact, chosen, staged / "report", checked=checked)
            _update_card(bundle, report, staged)
            # The recipe in a bundle states the limits that its plans were compiled with.
            published = dict(bundle.manifest.recipe)
            if "limits" in artifact.details:
                published["tensorrt"] = recipe.tensorrt.model_dump(mode="json")
            publish(staged, output, published, bundle.manifest.parents)
    return artifact


def _engine_graph(
    recipe: Recipe, bundle: Bundle, engine: Engine, options: CompileOptions
) -> tuple[Node[ExportedGraph], Node[PlanType] | None]:
    """Return the graph to compile, the bundle's own or one exported from the original model, and the type of a plan."""
    own, graph = Pipeline.form_of(recipe), bundle.graph
    form, context = engine_form(own, engine, recipe.tensorrt.dtype, options.max_context)
    if is_same_graph(graph, own, form, context):
        return Given(graph), Given(PlanType(form.dtype, form.dtype)) if has_plan_type(engine.name) else None
    pipeline = pipeline_of_bundle(recipe, bundle.path)
    quantization = Given(read_quantization(bundle.path, graph, pipeline.scheme))
    export, measured = pipeline.graph(quantization, form, context), _measured(bundle)
    plan_type = pipeline.plan_type(quantization, Given(measured) if measured else None)
    chosen = plan_type if form.dtype == "float16" else None
    return EngineGraph(Given(graph), own, export, chosen, engine.dtypes), plan_type


def _measured(bundle: Bundle) -> ValueRange | None:
    """Return the largest values that the bundle's report contains; None if it has none."""
    found = read_report(bundle.path / "report" / REPORT_JSON).plan_type
    if found is None or not found.values:
        return None
    return ValueRange.from_json(found.model_dump(include={"values", "corpus", "tokens"}))


def _copy(bundle: Bundle, staged: Path, replaced: str) -> None:
    """Copy all files of a bundle but documents and those of one engine; raises UntrustedArtifact if one has changed."""
    for name, entry in bundle.manifest.files.items():
        if name.startswith(replaced) or is_document(name):
            continue
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        place(bundle.path / name, staged / name, link=False)
        # Compiling takes minutes: make sure that what is published is what was verified before.
        if hash_file(staged / name) != entry.sha256:
            raise UntrustedArtifact(f"{name} changed during the run", hint="run `cushion-deploy verify`")


def _graphs_checked(bundle: Bundle) -> set[str]:
    """Return the digests of the graphs behind a bundle's engines, whose parity is in the bundle's report."""
    names = (name for name in ENGINES if f"engines/{name}/{ENGINE_FILE}" in bundle.manifest.files)
    return {bundle.graph.digest, *(read_engine(bundle, name).lineage.graph for name in names)}


def _update_report(artifact: EngineArtifact, plan_type: PlanType | None, folder: Path, *, checked: bool) -> Report:
    """Add an engine and the type of its plan to the report in ``folder``, or replace the same engine there.

    Checks of graphs behind plans are removed if none of them covers the graph of this plan, and so are those of an
    engine that is replaced.
    """
    report = read_report(folder / REPORT_JSON)
    others = [engine for engine in report.engines if engine.engine != artifact.engine]
    rows = (*others, EngineRow.model_validate(engine_row(artifact)))
    parity = tuple(row for row in report.parity if checked or not _OF_A_PLAN.search(row.rung))
    if artifact.engine != DEFAULT_ENGINE:
        parity = tuple(row for row in parity if not row.rung.startswith(f"{artifact.engine} engine "))
    changes: dict[str, Any] = {"engines": rows, "parity": parity}
    if plan_type:
        changes["plan_type"] = PlanTypeRow.model_validate(plan_type_row(plan_type))
    updated = report.model_copy(update=changes)
    write_report(updated, folder)
    return updated


def _update_card(bundle: Bundle, report: Report, staged: Path) -> None:
    """Write the model card of a report, with the origin that the card of the bundle states; an edited one is kept."""
    card = bundle.path / CARD_NAME
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    if CARD_NAME not in changed_documents(bundle.path, bundle.manifest):
        text = model_card(report, origin_of_card(text))
    if text:
        (staged / CARD_NAME).write_text(text, encoding="utf-8", newline="\n")
