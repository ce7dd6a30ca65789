"""`parity`: check that a bundle computes what was evaluated; intended for CI."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cushion_deploy.cli.bundle_options import bundle_argument, open_named
from cushion_deploy.cli.options import compute_options, compute_settings, engines_option, make_run, names, run_options
from cushion_deploy.cli.output import require_parent
from cushion_deploy.cli.progress import progress
from cushion_deploy.errors import ExitCode
from cushion_deploy.recipe import Recipe


@click.command("parity")
@bundle_argument
@click.option("--model", help="Original model. Default: from the bundle's recipe.")
@click.option("--eval-data", metavar="DATA", help="Text to compare on. Default: the one used by the build.")
@click.option("--junit", type=click.Path(path_type=Path), help="Write JUnit XML for CI.")
@click.option("--baseline", type=click.Path(path_type=Path), help="Also fail if a check is worse than in this file.")
@click.option("--write-baseline", type=click.Path(path_type=Path), help="Write the value of every check to this file.")
@engines_option("Engines on the ladder besides ONNX Runtime on the CPU. Default: those that the bundle was built for.")
@click.option("--reuse", is_flag=True, help="Use the stored result of an earlier run, if there is one.")
@compute_options
@run_options
def command(
    bundle: Path,
    model: str | None,
    eval_data: str | None,
    as_json: bool,
    junit: Path | None,
    baseline: Path | None,
    write_baseline: Path | None,
    engines: tuple[str, ...],
    work_dir: Path,
    reuse: bool,
    device: str | None,
    compute_dtype: str | None,
    quiet: bool,
) -> int:
    """Run the parity ladder for BUNDLE: torch, fake-quant, ONNX, engine, decode. Exit code 1 if a check fails."""
    from cushion_deploy.parity import baseline as baselines
    from cushion_deploy.verbs.parity import check_bundle, engines_to_run

    opened = open_named(bundle)
    overrides = {"model": model, "evaluation.data": eval_data, "parity.data": eval_data}
    given = {name: value for name, value in overrides.items() if value is not None}
    recipe = Recipe.from_bundle(opened.manifest.recipe).merged({**given, **compute_settings(device, compute_dtype)})
    for file in filter(None, (junit, write_baseline)):
        require_parent(file)
    earlier = baselines.read_baseline(baseline) if baseline else ()
    with progress(quiet) as report_progress:
        run = make_run(work_dir, report_progress)
        report = check_bundle(
            recipe, run, opened.path, opened.graph, engines_to_run(opened, names(engines)), reuse=reuse
        )
    if write_baseline:
        baselines.write_baseline(report, write_baseline)
    report = baselines.compare_baseline(report, earlier)
    if junit:
        from cushion_deploy.parity.junit import write_junit

        write_junit(report, junit)
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        for check in report.checks:
            mark = "ok  " if check.passed else "FAIL"
            where = f"  first diverging Site: {check.site}" if check.site and not check.passed else ""
            click.echo(
                f"{mark} {check.rung}: {check.metric} {check.value:.4g} ({check.direction} {check.limit:g}){where}"
            )
            if check.note:
                click.echo(f"       {check.note}")
        for sentence in report.unchecked:
            click.echo(f"not checked: {sentence}")
        click.echo(f"{'passed' if report.passed else 'FAILED'} on {report.tokens} tokens of {report.corpus}")
    return ExitCode.OK if report.passed else ExitCode.CHECK_FAILED
