"""`build`: turn a model into a verified INT8 bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.engine_options import (
    engines_option,
    float_linears_option,
    plan_options,
    split_targets,
    target_option,
)
from cushion_deploy.cli.help import option, output_option, verb
from cushion_deploy.cli.next_steps import after_build
from cushion_deploy.cli.options import compute_options, make_recipe, make_run, recipe_options
from cushion_deploy.cli.progress import progress
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import ExitCode, UsageError


@verb(
    "build",
    "build model.gguf --output OUT",
    "build org/name --calib-data chats.jsonl --engine onnxruntime,openvino --output OUT",
    "build --recipe recipe.yaml --set search.tau=0.4 --dry-run",
)
@click.argument("model_argument", metavar="[MODEL]", required=False)
@recipe_options
@compute_options
@output_option("FOLDER", "Folder of the bundle; an existing bundle is replaced.", default=Path("bundle"))
@option(
    *("--prefix", "ship"),
    heading="Prefix",
    type=click.Choice(["auto", "always", "never"]),
    metavar="auto|always|never",
    fallback="auto",
    help="Ship the prefix if the quantized model is closer to the original with it than without it (auto), in any "
    "case (always), or search for none (never, as --no-prefix).",
)
@engines_option(f"Engines to compile for ({', '.join(ENGINES)})", "every engine that can compile here")
@target_option
@plan_options
@float_linears_option
@option("--print-config", heading="Output", is_flag=True, help="Print the complete recipe as YAML, and stop.")
@option(
    "--dry-run",
    heading="Output",
    is_flag=True,
    help="Check the input, print the stages and which of them are finished, and stop.",
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
    """Build an INT8 bundle of MODEL.

    MODEL is a GGUF file, a Hugging Face folder, or a hub id (org/name). A build searches for the prefix, calibrates
    static scales, exports the ONNX graph, compiles it, evaluates it, and compares what was compiled with what was
    evaluated (parity). Finished stages are kept: the same command continues an interrupted build.

    The exit code is 1 if a parity check fails. The bundle is written nevertheless; its report names the failed checks.
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
