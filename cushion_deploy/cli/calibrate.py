"""`calibrate`: choose smoothing factors and static activation scales with a prefix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.help import output_option, verb
from cushion_deploy.cli.options import compute_options, make_recipe, make_shared_run, prefix_option, recipe_options
from cushion_deploy.cli.output import require_parent
from cushion_deploy.cli.progress import progress
from cushion_deploy.core.artifacts import (
    SCALES_FILE,
    SMOOTHING_FILE,
    read_prefix,
    write_kv_scales,
    write_scales,
    write_smoothing,
)
from cushion_deploy.core.kv_scales import KV_SCALES_FILE


@verb(
    "calibrate",
    "calibrate --model model.gguf --prefix prefix.safetensors",
    "calibrate --model org/name --no-prefix --calib-data chats.jsonl --output scales.json",
)
@recipe_options
@compute_options
@prefix_option("found by a search")
@output_option("FILE", "File to write; smoothing factors and cache scales go beside it.", default=Path(SCALES_FILE))
def command(prefix_file: Path | None, output: Path, **values: Any) -> None:
    """Calibrate static activation scales with a prefix.

    Observes every Site (an input that quantized linears share) on the calibration text behind the prefix. Writes the
    scales, and into the same folder the smoothing factors and, with --kv-cache int8, the scales of the cache.
    """
    recipe = make_recipe(values)
    require_parent(output)
    from cushion_deploy.stages.pipeline import Pipeline
    from cushion_deploy.stages.requirements import require_calibratable

    with progress(values["quiet"]) as report_progress:
        run = make_shared_run(values["work_dir"], report_progress, recipe)
        pipeline = Pipeline.of(recipe)
        branch = pipeline.behind(
            pipeline.given_prefix(read_prefix(prefix_file)) if prefix_file else pipeline.prefix, tuned=False
        )
        with run.lock():
            require_calibratable(pipeline, run)
            quantization = run.get(branch.quantization)
    if not run.processes.leads:
        return
    scales, smoothing = quantization.static_scales, quantization.smoothing
    write_scales(scales, output)
    written = [output]
    if smoothing:
        written.append(output.with_name(SMOOTHING_FILE))
        write_smoothing(smoothing, written[-1])
    if quantization.kv_scales:
        written.append(output.with_name(KV_SCALES_FILE))
        write_kv_scales(quantization.kv_scales, written[-1])
    if values["as_json"]:
        click.echo(json.dumps(scales.to_json()))
        return
    largest = sorted(scales.scales.items(), key=lambda item: -item[1])[:5]
    click.echo(f"{len(scales.scales)} Sites, estimator {scales.estimator}, {scales.tokens} tokens of text")
    for site, scale in largest:
        click.echo(f"  {site:<28} scale {scale:.6g}")
    click.echo(f"written: {', '.join(map(str, written))}")
