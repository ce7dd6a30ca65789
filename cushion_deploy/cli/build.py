"""`build`: turn a model into a verified INT8 bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.next_steps import after_build
from cushion_deploy.cli.options import (
    compute_options,
    float_linears_option,
    make_recipe,
    make_run,
    plan_options,
    recipe_options,
    split_targets,
    target_option,
)
from cushion_deploy.cli.progress import progress
from cushion_deploy.errors import ExitCode, UsageError


@click.command("build")
@click.argument("model_argument", metavar="[MODEL]", required=False)
@recipe_options
@compute_options
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    default=Path("bundle"),
    show_default=True,
    help="Folder of the bundle.",
)
@click.option(
    "--prefix",
    "ship",
    type=click.Choice(["auto", "always", "never"]),
    help="Ship the searched prefix: if the quantized model is closer to the original with it (auto, the default), "
    "always, or never, without a search (as --no-prefix).",
)
@click.option("--engine", "engines", multiple=True, help="Engine to compile; repeatable. Default: all available.")
@target_option
@plan_options
@float_linears_option
@click.option("--print-config", is_flag=True, help="Print the complete recipe as YAML and stop.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything that needs no computation, print the stages and which are finished, and stop.",
)
def command(
    model_argument: str | None,
    output: Path,
    targets: tuple[str, ...],
    allow_float_linears: int,
    print_config: bool,
    dry_run: bool,
    ship: str | None,
    **values: Any,
) -> int:
    """Build a bundle of MODEL: search for a prefix, calibrate, export, compile, check, report, publish.

    The exit code is 1 if a parity check fails; the bundle is still written, and its report names the failed checks.
    """
    if model_argument is not None:
        if values["model"] is not None:
            raise UsageError(f"two models were given: {model_argument} and {values['model']}", hint="give one of them")
        values["model"] = model_argument
    if values["no_prefix"] and ship in ("auto", "always"):
        raise UsageError(f"--no-prefix contradicts --prefix {ship}", hint="leave one of them out")
    values["no_prefix"] |= ship == "never"
    recipe = make_recipe({**values, "ship": None if ship == "never" else ship})
    if print_config:
        click.echo(recipe.to_yaml(), nl=False)
        return ExitCode.OK
    from cushion_deploy.verbs.build import build, dry_run_lines
    from cushion_deploy.verbs.build import dry_run as describe

    with progress(values["quiet"]) as report_progress:
        run = make_run(values["work_dir"], report_progress)
        options: dict[str, Any] = {"targets": split_targets(targets), "allow_float_linears": allow_float_linears}
        if dry_run:
            found = describe(recipe, run, output, **options)
            click.echo(json.dumps(found) if values["as_json"] else "\n".join(dry_run_lines(found)))
            return ExitCode.OK
        report = build(recipe, run, output, **options)
    passed = all(row.passed for row in report.parity)
    if values["as_json"]:
        click.echo(report.to_text())
    else:
        from rich.console import Console

        from cushion_deploy.report import summary

        Console(width=None if sys.stdout.isatty() else 80).print(summary(report))
        click.echo(f"\nbundle: {output}\nreport: {output / 'report' / 'report.html'}\n\nnext:")
        click.echo("\n".join(after_build(output, str(recipe.model), passed=passed)))
    return ExitCode.OK if passed else ExitCode.CHECK_FAILED
