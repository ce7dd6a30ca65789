"""`engine`: compile a graph for an engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from cushion_deploy.cli.options import limit_options
from cushion_deploy.cli.output import new_folder, require_new_folder
from cushion_deploy.cli.progress import progress
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.engines.registry import ENGINES, choose_engines
from cushion_deploy.errors import UsageError
from cushion_deploy.progress import elapsed
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import read_graph, verify_graph
from cushion_deploy.store import MANIFEST_NAME, verify_bundle


@click.command("engine")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--engine", "name", required=True, help=f"One of: {', '.join(ENGINES)}.")
@click.option("--target", "targets", multiple=True, help="GPU target of TensorRT, e.g. sm86; repeatable.")
@limit_options
@click.option("--allow-float-linears", type=int, default=0, help="Linears that may stay in floating point.")
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="New folder for the engine.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    folder: Path,
    name: str,
    targets: tuple[str, ...],
    max_batch: int | None,
    max_context: int | None,
    allow_float_linears: int,
    output: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile the graph in FOLDER (of `export`, or a bundle) and count the linears that run in INT8."""
    (engine,) = choose_engines([name])
    require_new_folder(output)
    # A bundle has a manifest of everything, a folder of `export` the digest of its graph: no engine sees a byte
    # that was not compared.
    recipe = Recipe()
    if os.path.lexists(folder / MANIFEST_NAME):
        recipe = Recipe.from_bundle(verify_bundle(folder).recipe)
    given = {"tensorrt.max_batch": max_batch, "tensorrt.max_context": max_context}
    limits = recipe.merged({name: value for name, value in given.items() if value is not None}).tensorrt
    graph = read_graph(folder)
    verify_graph(graph)
    if engine.graph_dtype != graph.contract.dtype:
        raise UsageError(
            f"engine '{name}' compiles {engine.graph_dtype} graphs, the one in {folder} is {graph.contract.dtype}",
            hint=f"write one with `cushion-deploy export --dtype {engine.graph_dtype}`",
        )
    options = CompileOptions(targets, limits.max_batch, limits.max_context, allow_float_linears=allow_float_linears)
    with progress(quiet) as report, elapsed(report, f"compiling for {name}"), new_folder(output) as staged:
        artifact = engine.compile(graph, staged, options)
    if as_json:
        click.echo(json.dumps(artifact.to_json()))
        return
    click.echo(
        f"{artifact.engine} for {', '.join(artifact.targets)}: "
        f"{artifact.int8_linears} of {artifact.linears} linears in INT8, "
        f"{artifact.fused_attention} fused attention kernels"
    )
    if not artifact.ran:
        click.echo(str(artifact.details.get("not_run", "not run")))
    click.echo(f"written: {output}")
