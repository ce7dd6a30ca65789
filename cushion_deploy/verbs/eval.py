"""Evaluate a model or a bundle: perplexity, zero-shot tasks and agreement, one column per way to run the model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.progress import Progress, titled
from cushion_deploy.errors import UsageError, unknown_choice
from cushion_deploy.evaluate.agreement import Agreement, tasks_agree, texts_agree
from cushion_deploy.evaluate.batches import BATCH
from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.evaluate.zeroshot import Metric, TaskScore, TaskSuite, mean_accuracy, run_tasks
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.runtime.engine import DEFAULT_ENGINE
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.windows import Cut
from cushion_deploy.store.json_files import finite
from cushion_deploy.verbs.columns import COLUMNS, Column, Columns


@dataclass
class Evaluation:
    """Scores of every column.

    Attributes:
        columns: keys of ``COLUMNS``.
        texts: for each text, the losses by column.
        text_tokens: for each text, the number of tokens of all of it.
        tasks: for each task, the score by column.
        agreements: the bundle's engine compared with its fake-quantized model; empty unless both ran.
        seconds: wall time by column, loading included.
        chat_template: whether the tasks were asked in the model's chat template.
        engine: the engine of the column of that name.
    """

    columns: tuple[str, ...]
    texts: dict[str, dict[str, TextScore]] = field(default_factory=dict)
    text_tokens: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, dict[str, TaskScore]] = field(default_factory=dict)
    agreements: tuple[Agreement, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    chat_template: bool = False
    engine: str = DEFAULT_ENGINE

    @property
    def passed(self) -> bool:
        """Whether every agreement holds."""
        return all(a.passed for a in self.agreements)

    @property
    def means(self) -> dict[str, Metric]:
        """The mean of the tasks' main metrics, by column; empty without tasks."""
        rows = list(self.tasks.values())
        return {column: mean_accuracy([row[column] for row in rows]) for column in self.columns} if rows else {}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; values that are not finite become null."""
        texts = [
            {
                "text": name,
                "window": next(iter(row.values())).window,
                "tokens": next(iter(row.values())).tokens,
                "text_tokens": self.text_tokens[name],
                "columns": {
                    c: {"perplexity": finite(s.perplexity), "stderr": finite(s.stderr)} for c, s in row.items()
                },
            }
            for name, row in self.texts.items()
        ]
        tasks = []
        for name, scores in self.tasks.items():
            first = next(iter(scores.values()))
            columns = {c: {m: _metric(v) for m, v in s.metrics.items()} for c, s in scores.items()}
            tasks.append({"task": name, "metric": first.metric, "n": first.n, "columns": columns})
        return {
            "columns": list(self.columns),
            "engine": self.engine,
            "texts": texts,
            "tasks": tasks,
            "chat_template": self.chat_template,
            "mean": {c: _metric(m) for c, m in self.means.items()},
            "agreement": [a.to_json() for a in self.agreements],
            "passed": self.passed,
            "seconds": {c: round(s, 1) for c, s in self.seconds.items()},
        }


@dataclass(frozen=True)
class Scored:
    """The texts and tasks that every column is scored on.

    Attributes:
        texts: texts as given with ``--data``.
        suite: zero-shot tasks; None for no tasks.
        limit: rows of each task; None for all.
        threads: threads of the engine.
        batch: contexts of tasks that run together.
        chat: whether tasks are asked in the model's chat template.
        engine: the engine of the column of that name.
    """

    texts: Sequence[str | None] = ()
    suite: TaskSuite | None = None
    limit: int | None = None
    threads: int | None = None
    batch: int = BATCH
    chat: bool = False
    engine: str = DEFAULT_ENGINE


def choose_columns(wanted: Sequence[str], bundle: Bundle | None) -> tuple[str, ...]:
    """Return the columns to run, in the order of the table; columns that the target does not have are rejected.

    Args:
        wanted: names of columns; empty for all that the target has.
        bundle: None for a model that is not built, which has the FP column only.

    Raises:
        UsageError: an unknown column, or one that the target does not have.
    """
    valid = ["fp"]
    if bundle is not None:
        valid = [c for c in COLUMNS if bundle.prefix_mode != "none" or not c.endswith("-prefix")]
    for name in wanted:
        if name not in COLUMNS:
            raise unknown_choice("column", name, list(COLUMNS))
        if name not in valid:
            what = "a model that has not been built" if bundle is None else "a bundle without a prefix"
            hint = "build it and give the bundle" if bundle is None else f"choose from: {', '.join(valid)}"
            raise UsageError(f"{what} has no column '{name}'", hint=hint)
    return tuple(c for c in valid if c in (wanted or valid))


def evaluate_columns(
    recipe: Recipe, run: Run, bundle: Bundle | None, columns: Sequence[str], what: Scored
) -> Evaluation:
    """Score every column on the texts and tasks.

    Args:
        recipe: gives the model and the windows of ``evaluation``.
        run: the work folder.
        bundle: a verified bundle; None for a model that is not built.
        columns: see :func:`choose_columns`.
        what: texts and tasks.

    Raises:
        UsageError: a text is too short or too long for the model, or the given model is not the bundle's.
    """
    found = Evaluation(tuple(columns), chat_template=what.chat, engine=what.engine)
    in_torch = any(c != "engine" for c in columns)
    opened = Columns(recipe, run, bundle, what.threads, what.engine)
    if in_torch:
        opened.pipeline  # noqa: B018 - a model that is not there is found before the work folder is locked
    with run.lock() if in_torch or "self" in what.texts else nullcontext():
        # A model that is not built has no prefix. One that is built is cut as in the build, unless it has sliding
        # windows and runs on an engine alone, which does not know them.
        reserved = None if bundle else 0
        texts = [(opened.corpus(data), Cut.of(recipe, data, reserved)) for data in what.texts]
        sliding = 0
        if in_torch:
            # Also rejects another model before any column is scored.
            sliding = run.get(opened.pipeline.files).spec.smallest_window
        for name in columns:
            if name == "engine" and not run.processes.leads:
                continue
            began = time.monotonic()
            with opened.open(name) as column:
                positions = column.scorer.session.contract.max_positions
                if bundle:
                    # A plan may be shorter than its model; every column is scored on the same windows.
                    positions = bundle.contract.max_positions
                _score_texts(found, name, column, texts, (positions, sliding), run.progress)
                # Several processes share the windows of texts; tasks run in the first one.
                if what.suite is not None and run.processes.leads:
                    from cushion_deploy.evaluate.lm_harness import ScorerLM

                    title = f"tasks: {COLUMNS[name]}"
                    lm = ScorerLM(column.scorer, column.encoding, run.progress, title, what.batch)
                    for result in run_tasks(
                        lm, what.suite, what.limit, chat=what.chat, progress=titled(run.progress, title)
                    ):
                        found.tasks.setdefault(result.task, {})[name] = result
            found.seconds[name] = time.monotonic() - began
    return replace(found, agreements=_agreements(found, bundle)) if run.processes.leads else found


def _score_texts(
    found: Evaluation,
    name: str,
    column: Column,
    texts: Sequence[tuple[Corpus, Cut]],
    fits: tuple[int, int],
    progress: Progress,
) -> None:
    """Score texts in windows that fit the positions and the sliding windows of a model."""
    limit, (positions, sliding) = column.scorer.limit, fits
    for corpus, cut in texts:
        window = cut.window_in(positions, sliding)
        if window > limit:
            raise UsageError(
                f"a window of {window} tokens is longer than the model's limit of {limit}",
                hint=f"set --window to at most {limit}",
            )
        windows = cut.windows(column.encoding.plain(corpus.text), positions, corpus.name, sliding)
        losses = column.losses(windows.ids, progress, f"perplexity: {COLUMNS[name]}")
        found.texts.setdefault(corpus.name, {})[name] = TextScore(losses)
        found.text_tokens[corpus.name] = windows.text_tokens


def _agreements(found: Evaluation, bundle: Bundle | None) -> tuple[Agreement, ...]:
    reference = "quantized-prefix" if bundle is not None and bundle.prefix_mode != "none" else "quantized"
    if not {"engine", reference} <= set(found.columns):
        return ()
    texts = [texts_agree(name, row["engine"], row[reference]) for name, row in found.texts.items()]
    return (*texts, *(tasks_agree(row["engine"], row[reference]) for row in found.tasks.values()))


def _metric(metric: Metric) -> dict[str, float | None]:
    return {"value": finite(metric.value), "stderr": finite(metric.stderr)}


def is_bundle(target: str) -> bool:
    """Return whether a path is a bundle, judged by its manifest."""
    from cushion_deploy.store.manifest import MANIFEST_NAME

    return (Path(target) / MANIFEST_NAME).is_file()
