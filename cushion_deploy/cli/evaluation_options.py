"""Options of the commands that measure a model on texts and tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cushion_deploy.cli.help import option
from cushion_deploy.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])
TEXTS = "a file (.txt, .md, .jsonl, .parquet), wikitext, c4, or a dataset on the hub (org/name)"
"""What an option for text takes."""
EVALUATION_TEXT = "other topics of the Python language reference"
"""What is evaluated on by default."""


def eval_data_option(what: str, fallback: str) -> Callable[[F], F]:
    """Return an option for the text that something is measured on."""
    return option("--eval-data", heading="Evaluation", metavar="DATA", fallback=fallback, help=what)


def window_options(function: F) -> F:
    """Add ``--window`` and ``--max-tokens``: how much text is scored, see :func:`scored_text`."""
    window = option(
        "--window",
        heading="Evaluation",
        type=click.IntRange(2),
        fallback="from the recipe; 2048 for wikitext",
        help="Tokens per window of text.",
    )
    tokens = option(
        "--max-tokens",
        heading="Evaluation",
        type=click.IntRange(2),
        fallback="from the recipe; all of wikitext",
        help="Tokens to read from the start of each text.",
    )
    return window(tokens(function))


def task_options(what: str) -> Callable[[F], F]:
    """Return the options for zero-shot tasks; ``what`` is the beginning of the help of ``--tasks``."""
    options = [
        option(
            "--tasks",
            heading="Tasks",
            multiple=True,
            metavar="TASKS",
            help=f"{what}, comma-separated: names of lm-eval (lambada, hellaswag, piqa, winogrande, openbookqa, rte, "
            "copa, or all), task files, or folders of task files. A task file can run Python code. Repeatable.",
        ),
        option(
            "--task-data",
            heading="Tasks",
            type=click.Path(path_type=Path, exists=True, file_okay=False),
            metavar="FOLDER",
            help="Folder with the data files that task files refer to.",
        ),
        option("--limit", heading="Tasks", type=click.IntRange(1), fallback="all", help="Rows of each task."),
        option(
            "--batch-size",
            heading="Tasks",
            type=click.IntRange(1),
            fallback="8",
            help="Rows of tasks that run together.",
        ),
    ]

    def decorate(function: F) -> F:
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


def scored_text(recipe: Recipe, window: int | None, max_tokens: int | None) -> dict[str, object]:
    """Return the settings that ``--window`` and ``--max-tokens`` override, so that at least one window is scored."""
    given: dict[str, object] = {}
    if window is not None:
        given["evaluation.window"] = window
        if recipe.evaluation.max_tokens is not None:
            given["evaluation.max_tokens"] = max(window, recipe.evaluation.max_tokens)
    if max_tokens is not None:
        given["evaluation.max_tokens"] = max_tokens
    return given
