"""`tune`: train the keys and values of a prefix together with the activation scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.options import make_recipe, make_run, recipe_options
from cushion_deploy.cli.output import new_folder, require_new_folder
from cushion_deploy.cli.progress import progress
from cushion_deploy.core.artifacts import (
    SCALES_FILE,
    SMOOTHING_FILE,
    read_prefix,
    write_prefix,
    write_scales,
    write_smoothing,
)
from cushion_deploy.core.prefix import PREFIX_FILE
from cushion_deploy.errors import UsageError


@click.command("tune")
@recipe_options
@click.option(
    "--prefix", "prefix_file", type=click.Path(path_type=Path), help="prefix.safetensors. Default: found by a search."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="New folder for the three files.")
def command(prefix_file: Path | None, output: Path, **values: Any) -> None:
    """Tune a prefix, resumably; write prefix.safetensors, scales.json and smoothing.safetensors for `export`.

    The best state on held-out text is kept; the untuned prefix is one of the candidates.
    """
    recipe = make_recipe({**values, "tune": True})
    require_new_folder(output)
    from cushion_deploy.stages.pipeline import Pipeline

    with progress(values["quiet"]) as report_progress:
        run = make_run(values["work_dir"], report_progress)
        pipeline = Pipeline.of(recipe)
        branch = pipeline.behind(pipeline.given_prefix(read_prefix(prefix_file)) if prefix_file else pipeline.prefix)
        with run.store.lock():
            quantization = run.get(branch.quantization)
            trace = run.get(branch.tuning).trace if branch.tuning else None
    if trace is None:
        raise UsageError("there is no prefix to tune: the search found none that pays", hint="build without --tune")
    with new_folder(output) as staged:
        write_prefix(quantization.prefix, staged / PREFIX_FILE)
        write_scales(quantization.static_scales, staged / SCALES_FILE)
        if quantization.smoothing:
            write_smoothing(quantization.smoothing, staged / SMOOTHING_FILE)
    if values["as_json"]:
        click.echo(json.dumps(trace.to_json()))
        return
    for state in trace.states:
        kept = " (kept)" if state.step == trace.best.step else ""
        click.echo(f"step {state.step:>4}: {trace.loss} on held-out text {state.words} nats per token{kept}")
    click.echo(f"written: {output}")
