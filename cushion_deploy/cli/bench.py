"""`bench`: time a bundle's engines and the same model in floating point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cushion_deploy.cli.bundle_options import bundle_argument, open_named
from cushion_deploy.cli.options import compute_options, compute_settings, engines_option, make_run, names, run_options
from cushion_deploy.cli.progress import progress
from cushion_deploy.recipe import Recipe
from cushion_deploy.report.render.formatting import size

if TYPE_CHECKING:
    from cushion_deploy.verbs.bench import Bench


@click.command("bench")
@bundle_argument
@click.option("--model", help="Original model, for the float twin. Default: from the bundle's recipe.")
@click.option("--no-float", is_flag=True, help="Skip the float twin; the original model is then not needed.")
@click.option("--prompt", type=click.IntRange(1), default=512, show_default=True, help="Number of prompt tokens.")
@click.option("--decoded", type=click.IntRange(1), default=32, show_default=True, help="Decode steps after the prompt.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Rows.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Number of timed rounds.")
@click.option("--threads", type=click.IntRange(1), help="Threads of every engine. Default: one per physical core.")
@engines_option("Engines beside ONNX Runtime on the CPU. Default: those that the bundle was built for.")
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
    """Time prefill and decode of BUNDLE's engines and of the same model in floating point, in interleaved rounds."""
    from cushion_deploy.evaluate.speed import Workload
    from cushion_deploy.verbs.bench import bench_bundle

    opened = open_named(bundle)
    recipe = Recipe.from_bundle(opened.manifest.recipe).merged(
        {**({"model": model} if model else {}), **compute_settings(device, compute_dtype)}
    )
    with progress(quiet) as report:
        workload = Workload(prompt, decoded, batch, rounds)
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
    lines = [f"prompt of {w.prompt}, {w.decoded} steps, batch {w.batch}, median of {w.rounds} interleaved rounds", ""]
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
