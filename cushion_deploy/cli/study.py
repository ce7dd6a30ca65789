"""`study`: measure the paper's tables and figures for a model; write them as JSON, Markdown, figures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.options import compute_options, make_recipe, make_run, names, recipe_options, scored_text
from cushion_deploy.cli.output import new_folder, require_new_folder
from cushion_deploy.cli.progress import progress
from cushion_deploy.errors import UsageError, require_modules


@click.command("study")
@click.argument("model", metavar="MODEL")
@recipe_options
@compute_options
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), required=True, help="New folder to write the study to."
)
@click.option(
    "--only",
    multiple=True,
    metavar="PARTS",
    help="Comma-separated parts: table1 to table6, remedies, figure2, figure3. Default: all.",
)
@click.option(
    "--window", type=click.IntRange(2), help="Tokens per window. Default: from the recipe; 2048 for wikitext."
)
@click.option(
    "--max-tokens", type=click.IntRange(2), help="Tokens to read per text. Default: from the recipe; wikitext: all."
)
@click.option(
    "--tasks",
    multiple=True,
    metavar="TASKS",
    help="Zero-shot tasks for Table 2, as in `eval`: lm-eval names, task files, or folders of task files.",
)
@click.option(
    "--task-data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with the data files that task files refer to.",
)
@click.option("--limit", type=click.IntRange(1), help="Rows per task. Default: all.")
@click.option("--batch-size", type=click.IntRange(1), help="Contexts of tasks that run together. Default: 8.")
def command(
    output: Path,
    only: tuple[str, ...],
    window: int | None,
    max_tokens: int | None,
    tasks: tuple[str, ...],
    task_data: Path | None,
    limit: int | None,
    batch_size: int | None,
    **values: Any,
) -> None:
    """Measure the tables and figures of the CushionCache paper for MODEL and compare them with the published numbers.

    Every measurement is stored in the work folder, so an interrupted study continues where it stopped, and a study
    with more parts measures only what is missing. The recipe determines the prefix; --tune tunes it.
    """
    from cushion_deploy.study.document import PARTS

    texts = values.pop("eval_data")
    recipe = make_recipe({**values, "eval_data": texts[0] if texts else None})
    recipe = recipe.merged(scored_text(recipe, window, max_tokens))
    if recipe.export.kv_cache != "float":
        raise UsageError(
            "a study needs a floating-point key/value cache", hint="remove export.kv_cache from the settings"
        )
    require_new_folder(output)
    chosen = names(only)
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        raise UsageError(f"unknown part '{unknown[0]}'", hint=f"choose from: {', '.join(PARTS)}")
    of_tasks = {"--limit": limit, "--task-data": task_data, "--batch-size": batch_size}
    given = [name for name, value in of_tasks.items() if value is not None]
    if given and not tasks:
        raise UsageError(f"{given[0]} needs --tasks, which was not given", hint="add --tasks")
    if len(set(texts)) < len(texts):
        raise UsageError("the same text was given twice", hint="pass each text to --eval-data only once")
    require_modules("torch", "transformers", "jinja2", "matplotlib")
    from cushion_deploy.evaluate.batches import BATCH
    from cushion_deploy.stages.pipeline import Pipeline
    from cushion_deploy.stages.requirements import require_calibration_text, require_evaluable, require_settings
    from cushion_deploy.study.cells import Cells
    from cushion_deploy.study.run import choose_parts, run_study
    from cushion_deploy.study.write import write_study
    from cushion_deploy.study.zeroshot import find_tasks

    parts = choose_parts(chosen)
    found = find_tasks(names(tasks), task_data, limit, batch_size or BATCH) if "table2" in parts else ""
    with progress(values["quiet"]) as report_progress:
        run, pipeline = make_run(values["work_dir"], report_progress), Pipeline.of(recipe)
        scored = texts or (recipe.evaluation.data,)
        with run.lock():
            require_settings(pipeline, run)
            require_evaluable(pipeline, run, scored)
            require_calibration_text(pipeline, run)
            study = run_study(Cells(pipeline, run, scored), parts, found)
    with new_folder(output) as staged:
        write_study(study, staged)
    if values["as_json"]:
        click.echo(study.model_dump_json())
        return
    for line in _summary(study):
        click.echo(line)
    click.echo(f"written: {output}")


def _summary(study: Any) -> list[str]:
    from cushion_deploy.printable import one_line
    from cushion_deploy.study.document import PARTS
    from cushion_deploy.study.statements import headline, sentences

    lines = [one_line(headline(study))]
    for part, title in PARTS.items():
        if getattr(study, part) is not None or part in study.left_out:
            lines += ["", title, *(f"  {one_line(sentence)}" for sentence in sentences(study, part))]
    return lines


def _study_options(params: list[click.Parameter]) -> list[click.Parameter]:
    """Return the options of `build`, with the model as an argument and --eval-data repeatable."""
    texts = click.Option(
        ["--eval-data"], multiple=True, metavar="DATA", help="Text to measure perplexity on. Repeatable."
    )
    kept = [p for p in params if not (isinstance(p, click.Option) and p.name in ("model", "eval_data"))]
    at = next(i for i, p in enumerate(kept) if p.name == "calib_data") + 1
    return [*kept[:at], texts, *kept[at:]]


command.params = _study_options(command.params)
