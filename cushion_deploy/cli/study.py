"""`study`: measure the paper's tables and figures for a model; write them as JSON, Markdown, figures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cushion_deploy.cli.evaluation_options import EVALUATION_TEXT, TEXTS, scored_text, task_options, window_options
from cushion_deploy.cli.help import Option, option, output_option, verb
from cushion_deploy.cli.options import compute_options, make_recipe, make_run, names, recipe_options
from cushion_deploy.cli.output import new_folder, require_new_folder
from cushion_deploy.cli.progress import progress
from cushion_deploy.errors import UsageError, require_modules


@verb(
    "study",
    "study model.gguf --output STUDY",
    "study org/name --only table1,figure2 --output STUDY",
)
@click.argument("model", metavar="MODEL")
@recipe_options
@compute_options
@output_option("FOLDER", "New folder for the study.")
@option(
    "--only",
    heading="Evaluation",
    multiple=True,
    metavar="PARTS",
    fallback="all",
    help="Parts to measure, comma-separated: table1 to table6, remedies, figure2, figure3. Repeatable.",
)
@window_options
@task_options("Zero-shot tasks for Table 2")
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
    """Reproduce the tables and figures of the CushionCache paper for MODEL.

    MODEL is a GGUF file, a Hugging Face folder, or a hub id (org/name). Measurements are compared with the published
    numbers. Each is kept in the work folder: the same command continues an interrupted study, and a study with more
    parts measures only what is missing.
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
    texts = Option(
        ["--eval-data"],
        heading="Evaluation",
        multiple=True,
        metavar="DATA",
        fallback=EVALUATION_TEXT,
        help=f"Text to evaluate on: {TEXTS}. Must differ from the calibration text. Repeatable.",
    )
    kept = [p for p in params if not (isinstance(p, click.Option) and p.name in ("model", "eval_data"))]
    at = next(i for i, p in enumerate(kept) if p.name == "calib_data") + 1
    return [*kept[:at], texts, *kept[at:]]


command.params = _study_options(command.params)
