"""`tune`: train the keys and values of a prefix, and with some losses the activation scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.help import output_option, verb
from cushion_deploy.cli.options import compute_options, make_recipe, make_run, prefix_option, recipe_options
from cushion_deploy.cli.output import new_folder, require_new_folder
from cushion_deploy.cli.progress import progress
from cushion_deploy.core.artifacts import (
    SCALES_FILE,
    SMOOTHING_FILE,
    read_prefix,
    write_kv_scales,
    write_prefix,
    write_scales,
    write_smoothing,
)
from cushion_deploy.core.kv_scales import KV_SCALES_FILE
from cushion_deploy.core.prefix import PREFIX_FILE
from cushion_deploy.errors import UsageError
from cushion_deploy.prefix.trace import TuningState


@verb(
    "tune",
    "tune --model model.gguf --output TUNED",
    "tune --model model.gguf --prefix TUNED/prefix.safetensors --set tuning.loss=distill --output TUNED-2",
)
@recipe_options
@compute_options
@prefix_option("found by a search")
@output_option("FOLDER", "New folder for the files.")
def command(prefix_file: Path | None, output: Path, **values: Any) -> None:
    """Train the keys and values of a prefix.

    Writes prefix.safetensors, scales.json and smoothing.safetensors for `export`, and with --kv-cache int8 also
    kv_scales.json. The state that is best on held-out text is kept, which may be the untuned one. The same command
    continues an interrupted run.

    By default, training makes the prefix invisible to the unquantized model. With --set tuning.loss=distill, prefix and
    scales are trained through the quantized model instead, or after a first run.
    """
    recipe = make_recipe({**values, "tune": True})
    if not prefix_file and not recipe.search.enabled:
        raise UsageError("there is no prefix to tune: the recipe disables it", hint="drop --no-prefix or give --prefix")
    require_new_folder(output)
    from cushion_deploy.stages.pipeline import Pipeline
    from cushion_deploy.stages.requirements import require_calibratable

    with progress(values["quiet"]) as report_progress:
        run = make_run(values["work_dir"], report_progress)
        pipeline = Pipeline.of(recipe)
        prefix = pipeline.given_prefix(read_prefix(prefix_file)) if prefix_file else pipeline.prefix
        branch = pipeline.behind(prefix)
        with run.lock():
            require_calibratable(pipeline, run)
            trace = run.get(branch.tuning).trace if branch.tuning and run.get(prefix).length else None
            if trace is None:
                why = "the given one is empty" if prefix_file else "the search found none that pays"
                raise UsageError(f"there is no prefix to tune: {why}", hint="build without --tune")
            quantization = run.get(branch.quantization)
    with new_folder(output) as staged:
        write_prefix(quantization.prefix, staged / PREFIX_FILE)
        write_scales(quantization.static_scales, staged / SCALES_FILE)
        if quantization.smoothing:
            write_smoothing(quantization.smoothing, staged / SMOOTHING_FILE)
        if quantization.kv_scales:
            write_kv_scales(quantization.kv_scales, staged / KV_SCALES_FILE)
    if values["as_json"]:
        click.echo(json.dumps(trace.to_json()))
        return
    for state in trace.states:
        kept = " (kept)" if state.step == trace.best.step else ""
        click.echo(f"step {state.step:>4}: {_on_held_out(state, trace.loss)}{kept}")
    click.echo(f"written: {output}")


def _on_held_out(state: TuningState, loss: str) -> str:
    """State the losses of a state on the held-out text."""
    if loss != "invisible" or state.whole is None:
        return f"{loss} on held-out text {state.words} nats per token"
    later = "" if state.later is None else f", from position 16 on {state.later:.4f}"
    error = "" if state.held_out_error is None else f", quantization error {state.held_out_error:.3f} times the untuned"
    return f"divergence on held-out text {state.whole:.4f} nats per token{later}{error}"


# This command tunes in any case.
command.params = [parameter for parameter in command.params if parameter.name != "tune"]
