"""`export`: write the ONNX graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.engine_options import dtype_option
from cushion_deploy.cli.help import FILE, option, output_option, verb
from cushion_deploy.cli.options import device_option, make_recipe, make_run, prefix_option, recipe_options
from cushion_deploy.cli.output import new_folder, require_new_folder
from cushion_deploy.cli.progress import progress
from cushion_deploy.core.artifacts import read_kv_scales, read_prefix, read_scales, read_smoothing
from cushion_deploy.errors import UsageError


@verb(
    "export",
    "export --model model.gguf --output GRAPH",
    "export --model model.gguf --prefix prefix.safetensors --scales scales.json --smoothing smoothing.safetensors "
    "--output GRAPH",
)
@recipe_options
@device_option
@prefix_option("what a build ships")
@option(
    *("--scales", "scales_file"),
    heading="Calibration",
    type=FILE,
    metavar="FILE",
    fallback="calibrated now",
    help="Scales to use, as `calibrate` writes them (scales.json).",
)
@option(
    *("--smoothing", "smoothing_file"),
    heading="Calibration",
    type=FILE,
    metavar="FILE",
    help="smoothing.safetensors of the calibration that wrote the scales. Requires --scales.",
)
@option(
    *("--kv-scales", "kv_file"),
    heading="Calibration",
    type=FILE,
    metavar="FILE",
    help="kv_scales.json of the same calibration, for --kv-cache int8. Requires --scales.",
)
@dtype_option("--dtype", "dtype", "Graph", "Floating-point type of everything that is not INT8.", default="fp32")
@option(
    *("--float", "float_twin"),
    heading="Graph",
    is_flag=True,
    help="Write the same graph in floating point, without Q/DQ nodes.",
)
@output_option("FOLDER", "New folder for the graph.")
def command(
    prefix_file: Path | None,
    scales_file: Path | None,
    smoothing_file: Path | None,
    kv_file: Path | None,
    dtype: Any,
    float_twin: bool,
    output: Path,
    **values: Any,
) -> None:
    """Export a model as an ONNX graph with Q/DQ nodes.

    The graph has INT8 weights, constant scales and the prefix as initializers; `engine` compiles it. Without files of
    an earlier search and calibration, it is the graph that `build` would ship.
    """
    recipe = make_recipe(values)
    require_new_folder(output)
    if smoothing_file and not scales_file:
        raise UsageError("--smoothing was given without --scales", hint="give both files of a calibration, or neither")
    quantized_cache = recipe.export.kv_cache == "int8"
    if bool(kv_file) != bool(scales_file and quantized_cache):
        raise UsageError(
            "--kv-scales needs --scales and --kv-cache int8" if kv_file else "--scales was given without --kv-scales",
            hint="give all files of one calibration and --kv-cache int8, or none of them",
        )
    from cushion_deploy.core.quantization import Quantization
    from cushion_deploy.export.write import check_exported
    from cushion_deploy.stages.base import Given, Node
    from cushion_deploy.stages.pipeline import Pipeline
    from cushion_deploy.stages.requirements import require_calibratable
    from cushion_deploy.store import place

    with progress(values["quiet"]) as report_progress:
        run = make_run(values["work_dir"], report_progress)
        pipeline = Pipeline.of(recipe)
        prefix = pipeline.given_prefix(read_prefix(prefix_file)) if prefix_file else pipeline.prefix
        with run.lock():
            # Without files, what a build would ship.
            found: Node[Quantization]
            if not scales_file:
                require_calibratable(pipeline, run)
            found = pipeline.behind(prefix).quantization if prefix_file else pipeline.shipped_quantization
            if scales_file:
                smoothing = read_smoothing(smoothing_file) if smoothing_file else None
                kv = read_kv_scales(kv_file) if kv_file else None
                parts = run.get(prefix), run.get(pipeline.whole_scheme), read_scales(scales_file), smoothing, kv
                found = Given(Quantization(*parts))
            form = replace(pipeline.form, dtype=dtype)
            if float_twin:
                found, form = Given(run.get(found).float_twin), form.float_twin
            graph, length = run.get(pipeline.graph(found, form)), run.get(found).prefix.length
    with new_folder(output) as staged:
        for file in (*graph.files, graph.path.with_name("export.json")):
            place(file, staged / file.name, link=False)
    if values["as_json"]:
        click.echo(json.dumps(graph.to_json()))
        return
    kind = f"{graph.linears} linears behind {len(graph.sites)} Sites" if graph.quantized else "floating-point twin"
    examined = check_exported(graph)
    click.echo(
        f"opset {graph.opset}, {kind}, prefix of {length} positions; rules checked: {len(examined)}"
        + (f", on {sum(examined.values()):,} nodes and tensors" if examined else "")
    )
    click.echo(f"written: {output / graph.path.name}")
