"""`search`: find the prefix of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.help import output_option, verb
from cushion_deploy.cli.options import compute_options, make_recipe, make_shared_run, recipe_options
from cushion_deploy.cli.output import require_parent
from cushion_deploy.cli.progress import progress
from cushion_deploy.core.artifacts import write_prefix
from cushion_deploy.core.prefix import PREFIX_FILE


@verb("search", "search --model model.gguf", "search --model org/name --max-length 8 --output prefix.safetensors")
@recipe_options
@compute_options
@output_option("FILE", "File to write.", default=Path(PREFIX_FILE))
def command(output: Path, **values: Any) -> None:
    """Search for the prefix of a model (Algorithm 1 of the paper).

    Writes a safetensors file with the keys and values of the prefix, and the tokens it was found with. `build` runs
    this search too; options that do not concern it are accepted, so that both commands share finished stages.
    """
    recipe = make_recipe(values)
    require_parent(output)
    from cushion_deploy.stages.pipeline import Pipeline
    from cushion_deploy.stages.requirements import require_calibratable

    with progress(values["quiet"]) as report_progress:
        run = make_shared_run(values["work_dir"], report_progress, recipe)
        pipeline = Pipeline.of(recipe)
        with run.lock():
            require_calibratable(pipeline, run)
            prefix = run.get(pipeline.prefix)
            trace = run.get(pipeline.search).trace if pipeline.search else None
    if not run.processes.leads:
        return
    write_prefix(prefix, output)
    if values["as_json"]:
        click.echo(json.dumps(trace.to_json() if trace else {"token_ids": []}))
        return
    if trace is None or not prefix.length:
        click.echo(f"empty prefix: {trace.stopped if trace else 'the recipe disables the prefix'}")
    else:
        click.echo(f"prefix: {list(trace.tokens)} (ids {list(trace.token_ids)}), {prefix.length} positions")
        for step in trace.steps:
            verdict = "accepted" if step.accepted else "rejected"
            found = f"{step.best.token!r} (found by {step.best.source})"
            click.echo(f"  {found}: leaves {100 * step.ratio:.1f} % of the {trace.objective}; {verdict}")
        click.echo(f"stopped because {trace.stopped}")
        if averaging := trace.averaging:
            verdict = "replaces the first token" if averaging.kept else "does not replace the first token"
            mean, token = averaging.averaged, averaging.found
            click.echo(
                f"the mean of {averaging.tokens:,} first tokens {verdict}: the unquantized model diverges by "
                f"{_number(mean.later)} nats per token from position 16 on (token: {_number(token.later)}), and the "
                f"{trace.objective} is {_number(mean.error)} (token: {_number(token.error)}, of which "
                f"{averaging.slack:g} times are allowed)"
            )
    click.echo(f"written: {output}")


def _number(value: float | None) -> str:
    return "no finite number" if value is None else f"{value:.4g}"
