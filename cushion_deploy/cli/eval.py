"""`eval`: perplexity and zero-shot tasks of the torch model, of fake quantization, and of a bundle's engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cushion_deploy.cli.bundle_options import open_named
from cushion_deploy.cli.evaluation_options import TEXTS, scored_text, task_options, window_options
from cushion_deploy.cli.help import FILE, option, verb
from cushion_deploy.cli.options import (
    compute_options,
    compute_settings,
    make_shared_run,
    model_option,
    names,
    run_options,
)
from cushion_deploy.cli.progress import progress
from cushion_deploy.cli.session_options import threads_option
from cushion_deploy.core.progress import Progress, elapsed
from cushion_deploy.engines.registry import ENGINES
from cushion_deploy.errors import ExitCode, UsageError
from cushion_deploy.recipe import Recipe

if TYPE_CHECKING:
    from cushion_deploy.runtime.bundle import Bundle
    from cushion_deploy.verbs.eval import Evaluation


@verb(
    "eval",
    "eval OUT",
    "eval OUT --data wikitext --data held-out.txt",
    "eval OUT --tasks lambada,piqa --columns fp,engine --limit 200",
)
@click.argument("target", metavar="TARGET")
@option(
    "--data",
    heading="Evaluation",
    multiple=True,
    metavar="DATA",
    fallback="from the recipe; none with --tasks",
    help=f"Text to evaluate on: {TEXTS}. Repeatable.",
)
@window_options
@task_options("Zero-shot tasks")
@option("--chat-template", heading="Tasks", is_flag=True, help="Ask tasks as a user's message in the chat template.")
@option(
    "--columns",
    heading="Evaluation",
    metavar="NAMES",
    fallback="all",
    help="Ways to run a bundle, comma-separated: fp, fp-prefix, quantized, quantized-prefix (in torch), engine.",
)
@option(
    "--engine",
    heading="Engine",
    metavar="NAME",
    fallback="onnxruntime",
    help=f"Engine of the column 'engine': {', '.join(ENGINES)}.",
)
@threads_option
@model_option
@option("--recipe", heading="Recipe", type=FILE, metavar="FILE", help="YAML file with settings; only for a model.")
@compute_options
@run_options
def command(
    target: str,
    data: tuple[str, ...],
    window: int | None,
    max_tokens: int | None,
    tasks: tuple[str, ...],
    task_data: Path | None,
    limit: int | None,
    batch_size: int | None,
    chat_template: bool,
    columns: str | None,
    engine: str | None,
    model: str | None,
    recipe: Path | None,
    threads: int | None,
    device: str | None,
    compute_dtype: str | None,
    work_dir: Path,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure perplexity and zero-shot accuracy of a bundle or a model.

    TARGET is a bundle or a model (GGUF file, Hugging Face folder), or either on the hub as org/name. A bundle is run
    in torch, in floating point and in simulated quantization (fake-quant), each with and without the prefix, and on its
    engine; this needs the original model. A model is run in floating point.

    The exit code is 1 if the engine differs from fake-quant by more than the noise of the measurement.
    """
    from cushion_deploy.evaluate.batches import BATCH
    from cushion_deploy.evaluate.zeroshot import TaskSuite
    from cushion_deploy.runtime.engine import DEFAULT_ENGINE
    from cushion_deploy.verbs.eval import Scored, choose_columns, evaluate_columns

    with progress(quiet) as report_progress:
        bundle = _open(target, model, recipe, report_progress)
    if bundle is None:
        settings = (Recipe.load(recipe) if recipe else Recipe()).merged({"model": target})
        flags = {"compute.device": device, "compute.dtype": compute_dtype}
        settings = settings.merged({name: value for name, value in flags.items() if value is not None})
    else:
        settings = Recipe.from_bundle(bundle.manifest.recipe).merged({"model": model} if model else {})
        settings = settings.merged(compute_settings(device, compute_dtype))
    settings = settings.merged(scored_text(settings, window, max_tokens))
    chosen = choose_columns(names([columns] if columns else []), bundle)
    if engine and "engine" not in chosen:
        raise UsageError("--engine was given, but the column 'engine' is not evaluated", hint="add it to --columns")
    wanted = names(tasks)
    of_tasks = {"--limit": limit, "--task-data": task_data, "--batch-size": batch_size}
    given = [name for name, value in of_tasks.items() if value is not None] + ["--chat-template"] * chat_template
    if given and not wanted:
        raise UsageError(f"{given[0]} needs --tasks, which was not given", hint="add --tasks")
    suite = TaskSuite(wanted, task_data) if wanted else None
    texts: Sequence[str | None] = data or ([] if wanted else [settings.evaluation.data])
    with progress(quiet) as report_progress:
        run = make_shared_run(work_dir, report_progress, settings)
        scored = Scored(texts, suite, limit, threads, batch_size or BATCH, chat_template, engine or DEFAULT_ENGINE)
        found = evaluate_columns(settings, run, bundle, chosen, scored)
    if not run.processes.leads:
        pass
    elif as_json:
        click.echo(json.dumps({"target": target, **found.to_json()}))
    else:
        for line in table(found):
            click.echo(line)
    return ExitCode.OK if found.passed else ExitCode.CHECK_FAILED


def table(found: Evaluation) -> list[str]:
    """Return the scores as lines: a row per text or task, a column per way to run the model, then the agreement."""
    from cushion_deploy.report.render.formatting import extent
    from cushion_deploy.runtime.engine import DEFAULT_ENGINE
    from cushion_deploy.verbs.columns import COLUMNS

    headings = COLUMNS if found.engine == DEFAULT_ENGINE else {**COLUMNS, "engine": found.engine}
    rows = [["", *(headings[c] for c in found.columns)]]
    for name, texts in found.texts.items():
        first = texts[found.columns[0]]
        part = extent(first.tokens, first.window, found.text_tokens[name])
        cells = [_cell(texts[c].perplexity, texts[c].stderr) for c in found.columns]
        rows.append([f"{name}, {part} (perplexity)", *cells])
    for name, tasks in found.tasks.items():
        scored = tasks[found.columns[0]]
        cells = [_cell(tasks[c].value, tasks[c].stderr) for c in found.columns]
        chat = ", chat template" if found.chat_template else ""
        rows.append([f"{name} ({scored.metric}, n={scored.n}{chat})", *cells])
    if found.tasks:
        rows.append(["mean of the tasks", *(_cell(m.value, m.stderr) for m in found.means.values())])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    for check in found.agreements:
        mark = "ok  " if check.passed else "FAIL"
        # Of perplexity, the difference is relative.
        relative = check.name in found.texts
        difference, limit = (
            f"{100 * value:.2f} %" if relative else f"{value:.4g}" for value in (check.difference, check.limit)
        )
        lines.append(
            f"{mark} engine vs. fake-quant, {check.name}: {check.metric} differs by {difference} (limit {limit})"
        )
    return [line.rstrip() for line in lines]


def _open(target: str, model: str | None, recipe: Path | None, report_progress: Progress) -> Bundle | None:
    """Return the verified bundle at ``target``; None if it is a model."""
    from cushion_deploy.runtime.hub import hub_bundle, is_on_hub
    from cushion_deploy.verbs.eval import is_bundle

    folder = Path(target) if is_bundle(target) else None
    if folder is None and is_on_hub(target):
        with elapsed(report_progress, f"looking for {target} on the hub"):
            folder = hub_bundle(target)
    if folder:
        if recipe:
            raise UsageError("--recipe cannot be used with a bundle, which has its own recipe", hint="remove --recipe")
        return open_named(folder, None, report_progress, local=True)
    if model:
        raise UsageError(
            f"--model was given, but {target} is not a bundle", hint="pass a bundle, or the model as the only argument"
        )
    return None


def _cell(value: float, stderr: float | None) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return "not finite"
    digits = 4 if abs(value) < 1 else 2
    noise = "" if stderr is None or stderr != stderr else f" ± {stderr:.{digits}f}"
    return f"{value:.{digits}f}{noise}"
