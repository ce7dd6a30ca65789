"""`bench`: time a bundle's engines and the same model in floating point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cushion_deploy.cli.bundle_options import bundle_argument, open_named
from cushion_deploy.cli.engine_options import engines_option
from cushion_deploy.cli.help import option, verb
from cushion_deploy.cli.options import compute_options, compute_settings, make_run, model_option, names, run_options
from cushion_deploy.cli.progress import progress
from cushion_deploy.cli.session_options import threads_option
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.render.formatting import size

if TYPE_CHECKING:
    from cushion_deploy.verbs.bench import Bench


@verb("bench", "bench OUT", "bench OUT --prompt 128 --decoded 64 --threads 1 --no-float")
@bundle_argument
@model_option
@option(
    "--no-float", heading="Workload", is_flag=True, help="Leave out the float model, so that --model is not needed."
)
@option("--prompt", heading="Workload", type=click.IntRange(1), default=512, help="Tokens of the prompt.")
@option("--decoded", heading="Workload", type=click.IntRange(1), default=32, help="Tokens decoded after the prompt.")
@option("--batch", heading="Workload", type=click.IntRange(1), default=1, help="Sequences in a batch.")
@option("--rounds", heading="Workload", type=click.IntRange(1), default=5, help="Timed rounds; medians are shown.")
@threads_option
@engines_option("Engines to time beside ONNX Runtime on the CPU", "those that the bundle was built for")
@compute_options
@run_options
def command(
    bundle: Path,
    model: str | None,
    no_float: bool,
    prompt: int,
    decoded: int,
    batch: int,
    rounds: int,
    threads: int | None,
    engines: tuple[str, ...],
    device: str | None,
    compute_dtype: str | None,
    work_dir: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the speed of BUNDLE, and of the same model in floating point.

    Prefill and decode of every engine are timed in interleaved rounds, so that a change in the load of the machine
    affects all of them. The table has tokens per second, and milliseconds per decode step.
    """
    from cushion_deploy.evaluate.speed import Workload
    from cushion_deploy.verbs.bench import bench_bundle

    given = {**({"model": model} if model else {}), **compute_settings(device, compute_dtype)}
    workload = Workload(prompt, decoded, batch, rounds)
    with progress(quiet) as report:
        opened = open_named(bundle, None, report)
        recipe = Recipe.from_bundle(opened.manifest.recipe).merged(given)
        run = make_run(work_dir, report)
        found = bench_bundle(recipe, run, opened, workload, threads=threads, twin=not no_float, engines=names(engines))
    click.echo(json.dumps(found.to_json()) if as_json else "\n".join(_lines(found)))


def _lines(found: Bench) -> list[str]:
    from cushion_deploy.verbs.bench import CPU_ENGINE

    w = found.workload
    rows = [("", "prefill tok/s", "decode tok/s", "decode p50 / p90 / p99 ms", "peak memory", "files")]
    for name, times in found.times.items():
        s = times.summary(w)
        rows.append(
            (
                name,
                f"{s['prefill_tokens_per_second']:,.0f}",
                f"{s['decode_tokens_per_second']:,.1f}",
                " / ".join(f"{value:.1f}" for value in s["decode_milliseconds"].values()),
                size(found.memory[name]) if name in found.memory else "",
                size(found.files[name]) if name in found.files else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rounds = "1 round" if w.rounds == 1 else f"{w.rounds} interleaved rounds"
    lines = [f"prompt of {w.prompt} tokens, {w.decoded} decode steps, batch {w.batch}, median of {rounds}", ""]
    for row in rows:
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    lines += [
        "",
        f"{CPU_ENGINE}: {found.kernels}",
        *(f"{name}: {'; '.join(said)}" for name, said in found.remarks.items()),
        *(f"{name}: {reason}" for name, reason in found.not_run.items()),
        *found.verdicts,
    ]
    return lines
