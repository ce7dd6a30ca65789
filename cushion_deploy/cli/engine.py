"""`engine`: compile a graph for an engine, or add an engine to a bundle."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

import click

from cushion_deploy.cli.engine_options import float_linears_option, plan_options, split_targets, target_option
from cushion_deploy.cli.help import FILE, option, output_option, verb
from cushion_deploy.cli.options import make_run, model_option, run_options
from cushion_deploy.cli.output import new_folder, require_new_folder
from cushion_deploy.cli.progress import progress
from cushion_deploy.core.dtypes import PlanDtype
from cushion_deploy.core.engine_artifact import EngineArtifact
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.progress import Progress, elapsed
from cushion_deploy.engines.base import CompileOptions, Engine
from cushion_deploy.engines.registry import ENGINES, choose_engines
from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import open_bundle, read_graph, verify_graph
from cushion_deploy.stages.compile import CompiledEngine, compile_options
from cushion_deploy.store import MANIFEST_NAME
from cushion_deploy.verbs.engine import add_engine

SHOWN = 2000
"""Maximum length of the printed vendor command; with 30 layers it has 20,000 characters."""


@verb(
    "engine",
    "engine OUT --engine openvino --output OUT",
    "engine OUT --engine tensorrt-rtx --target sm86,sm89 --output OUT-RTX",
    "engine GRAPH --engine onnxruntime --output COMPILED",
)
@click.argument("folder", type=FILE)
@option(
    *("--engine", "name"),
    heading="Engine",
    metavar="NAME",
    required=True,
    help=f"Engine to compile for: {', '.join(ENGINES)}.",
)
@target_option
@plan_options
@float_linears_option
@model_option
@output_option("FOLDER", "New folder; for a bundle also the bundle itself.")
@run_options
def command(
    folder: Path,
    name: str,
    targets: tuple[str, ...],
    max_batch: int | None,
    max_context: int | None,
    max_prefill: int | None,
    plan_dtype: PlanDtype | None,
    allow_float_linears: int,
    model: str | None,
    output: Path,
    work_dir: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile FOLDER for an engine, and count the linears that run in INT8.

    FOLDER is a bundle, or a graph that `export` wrote. From a bundle, --output becomes the bundle with that engine
    added or replaced; from a graph, the compiled engine alone. An engine that needs another graph than the bundle's
    (another floating-point type, a static cache) is compiled from a new export of the original model.
    """
    (engine,) = choose_engines([name])
    if plan_dtype and plan_dtype not in ("auto", *engine.dtypes):
        raise UsageError(
            f"engine '{name}' compiles {', '.join(engine.dtypes)} graphs, not {plan_dtype}", hint="omit --plan-dtype"
        )
    wanted = {
        "tensorrt.max_batch": max_batch,
        "tensorrt.max_context": max_context,
        "tensorrt.max_prefill": max_prefill,
        "tensorrt.dtype": plan_dtype,
        "model": model,
    }
    changes = {setting: value for setting, value in wanted.items() if value is not None}

    def options(recipe: Recipe) -> CompileOptions:
        return compile_options(recipe, split_targets(targets), allow_float_linears)

    with progress(quiet) as report:
        if os.path.lexists(folder / MANIFEST_NAME):
            bundle = open_bundle(folder)
            if output.resolve() != folder.resolve():
                require_new_folder(output)
            recipe = Recipe.from_bundle(bundle.manifest.recipe).merged(changes)
            artifact = add_engine(recipe, make_run(work_dir, report), bundle, engine, options(recipe), output)
            layers = bundle.graph.contract.num_layers
        else:
            graph = read_graph(folder)
            artifact = _compile_graph(graph, engine, options(Recipe().merged(changes)), plan_dtype, output, report)
            layers = graph.contract.num_layers
    if as_json:
        click.echo(json.dumps(artifact.to_json()))
        return
    is_plan = bool(artifact.details.get("limits"))
    fused = f", attention fused {artifact.fused_attention} of {layers}" if is_plan else ""
    click.echo(f"{artifact.engine}: {artifact.summary}{fused}")
    if is_plan and not artifact.fused_attention:
        click.echo(
            "warning: no attention is a fused kernel: every layer writes all scores to memory and reads them again"
        )
    if not artifact.form[1] and artifact.details.get("prefix_mode") == "cache":
        click.echo("the cache grows: only a float cache is updated in place, and only if the library has KVCacheUpdate")
    if not artifact.ran:
        click.echo(str(artifact.details.get("not_run", "not run")))
    if narrow := artifact.details.get("half_accumulators"):
        click.echo(f"warning: {len(narrow)} INT8 products are stored in float16 and may overflow: {narrow[0]} ...")
    if command_line := artifact.details.get("command"):
        shown = textwrap.shorten(command_line, SHOWN, placeholder=" ... (full command in engine.json)")
        click.echo(f"vendor command that builds the same plan:\n  {shown}")
    click.echo(f"written: {output}")
    if os.path.lexists(output / MANIFEST_NAME) and artifact.details.get("limits"):
        click.echo(f"check the graph of this plan with: cushion-deploy parity {output} --model MODEL")


def _compile_graph(
    graph: ExportedGraph,
    engine: Engine,
    options: CompileOptions,
    dtype: PlanDtype | None,
    output: Path,
    report: Progress,
) -> EngineArtifact:
    require_new_folder(output)
    # A folder from `export` has no manifest; the digest of its graph is verified before an engine reads the graph.
    verify_graph(graph)
    found = graph.contract.dtype
    if found not in engine.dtypes or (dtype and dtype not in ("auto", found)):
        wanted = dtype if dtype and dtype != "auto" else engine.dtypes[0]
        raise UsageError(
            f"engine '{engine.name}' was asked to compile a {wanted} graph, but the one in {graph.path.parent} "
            f"is {found}",
            hint=f"write one with `cushion-deploy export --dtype {wanted}`",
        )
    with elapsed(report, f"compiling for {engine.name}"), new_folder(output) as staged:
        return CompiledEngine(engine.compile(graph, staged, options), staged).tried(graph)
