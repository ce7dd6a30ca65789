"""`parity`: check that a bundle computes what was evaluated; intended for CI."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cushion_deploy.cli.bundle_options import bundle_argument, open_named
from cushion_deploy.cli.engine_options import engines_option
from cushion_deploy.cli.evaluation_options import TEXTS, eval_data_option
from cushion_deploy.cli.help import FILE, option, verb
from cushion_deploy.cli.options import compute_options, compute_settings, make_run, model_option, names, run_options
from cushion_deploy.cli.output import require_parent
from cushion_deploy.cli.progress import progress
from cushion_deploy.errors import ExitCode
from cushion_deploy.recipe import Recipe


@verb(
    "parity",
    "parity OUT --junit parity.xml",
    "parity OUT --model org/name --write-baseline baseline.json",
    "parity OUT --model org/name --baseline baseline.json",
)
@bundle_argument
@model_option
@eval_data_option(f"Text to compare on: {TEXTS}.", "that of the build")
@option("--junit", heading="Checks", type=FILE, metavar="FILE", help="Write the checks as JUnit XML, for CI.")
@option(
    "--baseline",
    heading="Checks",
    type=FILE,
    metavar="FILE",
    help="Also fail if a check is worse than in this file of --write-baseline.",
)
@option(
    "--write-baseline",
    heading="Checks",
    type=FILE,
    metavar="FILE",
    help="Write the value of every check, with tolerances to edit.",
)
@option("--reuse", heading="Checks", is_flag=True, help="Use the result of an earlier run of the same checks.")
@engines_option("Engines to check beside ONNX Runtime on the CPU", "those that the bundle was built for")
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
    """Check that BUNDLE computes what was evaluated.

    Compares the original model in torch, its simulated quantization (fake-quant), model.onnx, every engine, and
    decoding token by token with prefill; a check that fails names the first Site that differs. Needs the original
    model. The exit code is 1 if a check fails.
    """
    from cushion_deploy.parity import baseline as baselines
    from cushion_deploy.stages.parity import Parity
    from cushion_deploy.verbs.parity import check_bundle, engines_to_run

    overrides = {"model": model, "evaluation.data": eval_data, "parity.data": eval_data}
    given = {name: value for name, value in overrides.items() if value is not None}
    for file in filter(None, (junit, write_baseline)):
        require_parent(file)
    earlier = baselines.read_baseline(baseline) if baseline else ()
    with progress(quiet) as report_progress:
        opened = open_named(bundle, None, report_progress)
        recipe = Recipe.from_bundle(opened.manifest.recipe).merged({**given, **compute_settings(device, compute_dtype)})
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
        reused = any(time.stage == Parity.name and time.reused for time in run.times)
        verdict, earlier_run = "passed" if report.passed else "FAILED", "; the result of an earlier run" * reused
        click.echo(f"{verdict} on {report.tokens} tokens of {report.corpus}{earlier_run}")
    return ExitCode.OK if report.passed else ExitCode.CHECK_FAILED
