"""Parity: check that a finished bundle computes what was evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cushion_deploy.core.artifacts import SCALES_FILE, read_scales
from cushion_deploy.core.engine_artifact import ENGINE_FILE, read_artifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import MissingDependency, UsageError
from cushion_deploy.parity.checks import ParityReport
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.runtime.engine import DEFAULT_ENGINE, is_built_for, open_engine, read_engine
from cushion_deploy.stages.base import Given, Node
from cushion_deploy.stages.compile import EngineToRun
from cushion_deploy.stages.parity import Parity, read_result
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.quantization import read_quantization
from cushion_deploy.stages.run import Inputs, Run
from cushion_deploy.store.digests import digest_json
from cushion_deploy.store.files import temporary_folder
from cushion_deploy.store.manifest import read_manifest


def pipeline_of_bundle(recipe: Recipe, bundle: Path) -> Pipeline:
    """Return the pipeline of the model that a bundle was built from.

    Raises:
        UsageError: the model or the device is not available, or another model was given.
    """
    try:
        source = Pipeline.locate(recipe)
    except UsageError as e:
        if recipe.model != read_manifest(bundle).recipe.get("model"):  # given with --model
            raise
        raise UsageError(
            f"the model that the bundle was built from is not available: {e.message}",
            hint="give it with --model: a GGUF file, a Hugging Face folder, or a hub id",
        ) from e
    pipeline = Pipeline(recipe, source)
    require_model_of(pipeline, bundle)
    return pipeline


def require_model_of(pipeline: Pipeline, bundle: Path) -> None:
    """Check that a pipeline's model is the one that a bundle was built from; raises UsageError otherwise."""
    if read_scales(bundle / SCALES_FILE).lineage.model != pipeline.source.digest:
        named = read_manifest(bundle).recipe.get("model")
        raise UsageError(
            f"{pipeline.source.label} is not the model that the bundle was built from",
            hint=f"give the original model with --model; the bundle's recipe names it {named}",
        )


def engines_to_run(bundle: Bundle, names: Sequence[str] = ()) -> tuple[EngineToRun, ...]:
    """Return the engines to put on the parity ladder of a bundle, besides ONNX Runtime on the CPU.

    Args:
        bundle: a verified bundle.
        names: engines that have to run; empty for those that the bundle was built for, where each may be missing.

    Raises:
        UsageError: an unknown engine, or a plan that the bundle does not contain.
        MissingDependency, CheckFailed: a named engine does not run here.
    """
    for name in names:
        open_engine(bundle, name).close()
    if not names:
        built = (name for name in ENGINES if is_built_for(bundle, name))
        names = [name for name in built if ENGINES[name].compiles_to != "report"]
    return tuple(_of_bundle(bundle, name) for name in dict.fromkeys(names) if name != DEFAULT_ENGINE)


def _of_bundle(bundle: Bundle, name: str) -> EngineToRun:
    compiled = read_engine(bundle, name).key if is_built_for(bundle, name) else bundle.graph.digest
    return EngineToRun(name, digest_json([name, compiled, *_installed(name)]), lambda: open_engine(bundle, name))


def _installed(name: str) -> tuple[str, ...]:
    """Return the version of an engine's library and the GPUs, on which the result of a run depends; why not, if not."""
    try:
        return ENGINES[name].version(), *(ENGINES[name].gpus() or ())
    except MissingDependency as e:
        return (e.message,)


def check_bundle(
    recipe: Recipe,
    run: Run,
    bundle: Path,
    graph: ExportedGraph,
    engines: Sequence[EngineToRun] = (),
    *,
    reuse: bool = False,
) -> ParityReport:
    """Return the parity report of a verified bundle.

    Args:
        recipe: the recipe of the bundle; its model is the original.
        run: the work folder.
        bundle, graph: the bundle to check, and its graph.
        engines: see :func:`engines_to_run`.
        reuse: use the result of an earlier run if there is one, and keep this result for later runs.

    Raises:
        UsageError: the original model is not available, or the given one is another model.
    """
    pipeline = pipeline_of_bundle(recipe, bundle)
    quantization = Given(read_quantization(bundle, graph, pipeline.scheme))
    with run.lock():
        plans, unchecked = _graphs_behind_plans(pipeline, run, quantization, bundle, graph)
        opened = tuple(Given[EngineToRun | None](engine) for engine in engines)
        report = climb(run, pipeline.parity(quantization, Given(graph), plans, opened), reuse=reuse)
    return replace(report, unchecked=(*unchecked, *report.unchecked))


def climb(run: Run, stage: Parity, *, reuse: bool) -> ParityReport:
    """Return the report of a parity stage.

    Args:
        run: the work folder.
        stage: the parity stage.
        reuse: use the result of an earlier run if there is one, and keep this result for later runs.
    """
    if reuse:
        return run.get(stage).report
    with temporary_folder("cushion-parity-") as folder:
        return read_result(stage.climb(Inputs(run, stage), folder)).report


def _graphs_behind_plans(
    pipeline: Pipeline, run: Run, quantization: Node[Quantization], bundle: Path, graph: ExportedGraph
) -> tuple[tuple[Node[ExportedGraph], ...], tuple[str, ...]]:
    """Export the graphs behind the plans of a bundle again; also return what cannot be checked, in sentences.

    A bundle contains only the compiled plans. If the exporter now writes a different graph than the one that the plan
    was compiled from (in a later version), checking that graph would say nothing about the plan.
    """
    graphs: list[Node[ExportedGraph]] = []
    unchecked = []
    folders = [bundle / "engines" / name for name in ENGINES]
    for artifact in (read_artifact(folder) for folder in folders if (folder / ENGINE_FILE).is_file()):
        if artifact.lineage.graph == graph.digest:
            continue
        dtype, capacity = artifact.form
        gathers_codes = pipeline.form.gathers_codes and ENGINES[artifact.engine].gathers_codes
        form = replace(pipeline.form, dtype=dtype, gathers_codes=gathers_codes)
        if capacity:
            form = replace(form, cache="static", capacity=capacity)
        exported = pipeline.graph(quantization, form)
        if artifact.lineage.graph == run.get(exported).digest:
            graphs.append(exported)
        else:
            unchecked.append(
                f"the graph behind the plan of {artifact.engine} is not checked: this version exports a different one; "
                f"compile it again with `cushion-deploy engine`"
            )
    return tuple(graphs), tuple(unchecked)
