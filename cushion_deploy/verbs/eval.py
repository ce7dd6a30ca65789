"""Evaluate a model or a bundle: perplexity, zero-shot tasks and agreement, one column per way to run the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cushion_deploy.calib.corpora import Corpus, load_corpus
from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.errors import UsageError, unknown_choice
from cushion_deploy.evaluate.agreement import Agreement, tasks_agree, texts_agree
from cushion_deploy.evaluate.encoding import Encoding
from cushion_deploy.evaluate.perplexity import TextScore, cut_windows, score_text
from cushion_deploy.evaluate.scorer import Scorer
from cushion_deploy.evaluate.zeroshot import Metric, TaskScore, TaskSuite, mean_accuracy, run_tasks
from cushion_deploy.recipe import Evaluation as EvaluationSettings
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.quantization import read_quantization
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.windows import scored_tokens
from cushion_deploy.store.json_files import finite
from cushion_deploy.verbs.parity import pipeline_of_bundle

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

COLUMNS = {
    "fp": "FP",
    "fp-prefix": "FP + prefix",
    "quantized": "W8A8",
    "quantized-prefix": "W8A8 + prefix",
    "engine": "engine",
}
"""Ways to run a model and their headings, in the order of the table; all but the last run in torch."""


@dataclass
class Evaluation:
    """Scores of every column.

    Attributes:
        columns: keys of ``COLUMNS``.
        texts: for each text, the losses by column.
        tasks: for each task, the score by column.
        agreements: the bundle's engine compared with its fake-quantized model; empty unless both ran.
        seconds: wall time by column, loading included.
    """

    columns: tuple[str, ...]
    texts: dict[str, dict[str, TextScore]] = field(default_factory=dict)
    tasks: dict[str, dict[str, TaskScore]] = field(default_factory=dict)
    agreements: tuple[Agreement, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

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
                "tokens": next(iter(row.values())).tokens,
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
            "texts": texts,
            "tasks": tasks,
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
    """

    texts: Sequence[str | None] = ()
    suite: TaskSuite | None = None
    limit: int | None = None
    threads: int | None = None


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
    found = Evaluation(tuple(columns))
    in_torch = any(c != "engine" for c in columns)
    with run.lock() if in_torch or "self" in what.texts else nullcontext():
        scorers = _Scorers(recipe, run, bundle, what.threads)
        corpora = [scorers.corpus(data) for data in what.texts]
        if in_torch:
            scorers.pipeline  # noqa: B018 - reject another model before any column is scored
        for name in columns:
            if name == "engine" and not run.processes.leads:
                continue
            began = time.monotonic()
            with scorers.open(name) as column:
                _score_texts(found, name, column, corpora, recipe.evaluation, run.progress)
                # Several processes share the windows of texts; tasks run in the first one.
                if what.suite is not None and run.processes.leads:
                    from cushion_deploy.evaluate.lm_harness import ScorerLM

                    lm = ScorerLM(column.scorer, column.encoding, run.progress, f"tasks: {COLUMNS[name]}")
                    for result in run_tasks(lm, what.suite, what.limit):
                        found.tasks.setdefault(result.task, {})[name] = result
            found.seconds[name] = time.monotonic() - began
    return replace(found, agreements=_agreements(found, bundle)) if run.processes.leads else found


@dataclass(frozen=True)
class _Column:
    """A way to run the model: its scorer, its encoding, and the losses of windows, float32 ``[count, window - 1]``."""

    scorer: Scorer
    encoding: Encoding
    losses: Callable[[IntArray, Progress, str], FloatArray]


def _score_texts(
    found: Evaluation,
    name: str,
    column: _Column,
    corpora: Sequence[Corpus],
    config: EvaluationSettings,
    progress: Progress,
) -> None:
    limit = column.scorer.limit
    window, most = scored_tokens(config.window, config.max_tokens)
    if corpora and window > limit:
        raise UsageError(
            f"a window of {window} tokens is longer than the model's limit of {limit}",
            hint=f"set --window to at most {limit}",
        )
    for corpus in corpora:
        windows = cut_windows(column.encoding.plain(corpus.text), window, most, corpus.name)
        losses = column.losses(windows, progress, f"perplexity: {COLUMNS[name]}")
        found.texts.setdefault(corpus.name, {})[name] = TextScore(losses)


@dataclass
class _Scorers:
    """Opens the columns of one evaluation, each for the time that it is scored.

    Attributes:
        recipe, run, bundle: see :func:`evaluate_columns`.
        threads: threads of the engine.
    """

    recipe: Recipe
    run: Run
    bundle: Bundle | None
    threads: int | None

    @cached_property
    def pipeline(self) -> Pipeline:
        """The pipeline of the original model; raises UsageError if the given model is not the bundle's."""
        return pipeline_of_bundle(self.recipe, self.bundle.path) if self.bundle else Pipeline.of(self.recipe)

    @cached_property
    def model(self) -> TorchRunner:
        """The original model."""
        return self.run.get(self.pipeline.model)

    def corpus(self, data: str | None) -> Corpus:
        """Return a text; the model is loaded only if the text is sampled from it."""
        return self.run.get(self.pipeline.corpus(data, "evaluation")) if data == "self" else read_text(data)

    @contextmanager
    def open(self, column: str) -> Iterator[_Column]:
        """Yield what a column is scored with; quantized weights are restored afterwards."""
        if self.bundle is not None and column == "engine":
            scorer = Scorer(open_session(self.bundle.graph, threads=self.threads))
            encoding = Encoding.of_bundle(self.bundle)
            yield _Column(scorer, encoding, lambda *args: score_text(scorer.nll, *args).losses)
        elif column.startswith("quantized"):
            with self._quantized(column) as found:
                yield found
        else:
            prefix = self._built.prefix if column == "fp-prefix" else self.run.get(self.pipeline.no_prefix)
            yield self._in_torch(self.model, prefix)

    @contextmanager
    def _quantized(self, column: str) -> Iterator[_Column]:
        from cushion_deploy.modeling.simulate import simulated

        used = self._built
        if column == "quantized" and used.prefix.length:
            # The same recipe without a prefix has its own smoothing and calibration.
            used = self.run.get(self.pipeline.bare.quantization)
        model = self.model.folded(used.smoothing)
        with simulated(model, used.scheme, used.scales, kv=used.kv_scales):
            yield self._in_torch(model, used.prefix)

    @property
    def _built(self) -> Quantization:
        """The quantization of the bundle."""
        if self.bundle is None:
            raise UsageError("a model that has not been built has no quantized columns", hint="build it first")
        return read_quantization(self.bundle.path, self.bundle.graph, self.pipeline.scheme)

    def _in_torch(self, model: TorchRunner, prefix: Prefix) -> _Column:
        from cushion_deploy.modeling.session import TorchSession

        encoding = replace(self._encoding(), keep_bos=prefix.length == 0)
        scorer = Scorer(TorchSession(model, prefix))
        return _Column(scorer, encoding, lambda ids, progress, task: model.token_nll(ids, prefix, progress, task))

    def _encoding(self) -> Encoding:
        if self.bundle is not None:
            return Encoding.of_bundle(self.bundle)
        tokenizer = self.model.tokenizer
        return Encoding.of_tokenizer(tokenizer.backend_tokenizer, tokenizer.bos_token_id, self.model.spec)


def read_text(data: str | None) -> Corpus:
    """Return an evaluation text that needs no model."""
    return load_corpus(data, "evaluation")


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
