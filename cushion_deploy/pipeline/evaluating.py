"""Evaluate a model or a bundle: perplexity and zero-shot tasks, one column a way to run it, and their agreement."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from cushion_deploy.core.artifacts import read_prefix
from cushion_deploy.core.prefix import PREFIX_FILE
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.errors import UsageError, unknown_choice
from cushion_deploy.evaluate.agreement import Agreement, tasks_agree, texts_agree
from cushion_deploy.evaluate.encoding import Encoding
from cushion_deploy.evaluate.perplexity import TextScore, cut_windows, score_text
from cushion_deploy.evaluate.scorer import Scorer
from cushion_deploy.evaluate.zeroshot import Metric, TaskScore, TaskSuite, mean_accuracy, run_tasks
from cushion_deploy.pipeline.prepare import require_model_of
from cushion_deploy.pipeline.workspace import Workspace
from cushion_deploy.runtime.bundle import Bundle

COLUMNS = {
    "fp": "FP",
    "fp-prefix": "FP + prefix",
    "quantized": "W8A8",
    "quantized-prefix": "W8A8 + prefix",
    "engine": "engine",
}
"""Ways to run a model, in the order of a table, with their headings; all but the last run in torch."""


@dataclass
class Evaluation:
    """Scores of every column.

    Attributes:
        columns: names out of ``COLUMNS``.
        texts: text to column to its losses.
        tasks: task to column to its score.
        agreements: the artifact against its fake-quantized model; empty where not both were run.
        seconds: column to wall time, loading included.
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
        """Column to the mean of the main metrics over tasks; empty without tasks."""
        rows = list(self.tasks.values())
        return {column: mean_accuracy([row[column] for row in rows]) for column in self.columns} if rows else {}

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; what is not finite becomes null."""
        texts = [
            {
                "text": name,
                "tokens": next(iter(row.values())).tokens,
                "columns": {
                    c: {"perplexity": _finite(s.perplexity), "stderr": _finite(s.stderr)} for c, s in row.items()
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


def choose_columns(wanted: Sequence[str], bundle: Bundle | None) -> tuple[str, ...]:
    """Return the columns to run, in the order of a table; those that a target cannot have are refused.

    Args:
        wanted: names; empty for all that differ from each other.
        bundle: None for a model alone, which has FP only.

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
            what = "a model that is not built yet" if bundle is None else "a bundle without a prefix"
            hint = "build it and give the bundle" if bundle is None else f"choose from: {', '.join(valid)}"
            raise UsageError(f"{what} has no column '{name}'", hint=hint)
    return tuple(c for c in valid if c in (wanted or valid))


def evaluate_columns(
    ws: Workspace,
    bundle: Bundle | None,
    columns: Sequence[str],
    *,
    texts: Sequence[str | None] = (),
    suite: TaskSuite | None = None,
    limit: int | None = None,
    threads: int | None = None,
) -> Evaluation:
    """Run every column over the texts and tasks.

    Args:
        ws: the recipe (windows of ``evaluation``), the model, and where stages are kept.
        bundle: a verified bundle; None for a model alone.
        columns: see :func:`choose_columns`.
        texts: what :meth:`Workspace.corpus` takes.
        suite: tasks; None for none.
        limit: rows of each task.
        threads: of the engine.

    Raises:
        UsageError: a text is too short or too long for the model, or the model is not the bundle's.
    """
    config = ws.recipe.evaluation
    found = Evaluation(tuple(columns))
    in_torch = any(c != "engine" for c in columns)
    with ws.store.lock() if in_torch or "self" in texts else nullcontext():
        corpora = [ws.corpus(data, "evaluation") for data in texts]
        if bundle is not None and in_torch:
            require_model_of(ws, bundle.path)
        for column in columns:
            began = time.monotonic()
            with _column(ws, bundle, column, threads) as (scorer, encoding):
                if corpora and config.window > scorer.limit:
                    raise UsageError(
                        f"a window of {config.window} tokens is longer than the {scorer.limit} that the model takes",
                        hint=f"give --window {scorer.limit} at most",
                    )
                for corpus in corpora:
                    windows = cut_windows(encoding.plain(corpus.text), config.window, config.max_tokens, corpus.name)
                    task = f"perplexity: {COLUMNS[column]}"
                    score = score_text(scorer.nll, windows, ws.progress, task)
                    found.texts.setdefault(corpus.name, {})[column] = score
                if suite is not None:
                    from cushion_deploy.evaluate.lm_harness import ScorerLM

                    lm = ScorerLM(scorer, encoding, ws.progress, f"tasks: {COLUMNS[column]}")
                    for result in run_tasks(lm, suite, limit):
                        found.tasks.setdefault(result.task, {})[column] = result
            found.seconds[column] = time.monotonic() - began
    return replace(found, agreements=_agreements(found, bundle))


@contextmanager
def _column(
    ws: Workspace, bundle: Bundle | None, column: str, threads: int | None
) -> Iterator[tuple[Scorer, Encoding]]:
    """Yield a column's scorer and encoding; quantized weights are taken back afterwards."""
    if bundle is not None and column == "engine":
        session = open_session(bundle.graph, threads=threads)
        yield Scorer(session), Encoding.of_bundle(bundle)
        return
    from cushion_deploy.modeling.session import TorchSession
    from cushion_deploy.modeling.simulate import simulated
    from cushion_deploy.pipeline.prepare import prepare, read_deployed

    empty = ws.model.compute_prefix(ws.model.bare_tokens)
    encoding = _encoding(ws, bundle)
    if not column.startswith("quantized"):
        prefix = read_prefix(bundle.path / PREFIX_FILE) if bundle is not None and column == "fp-prefix" else empty
        yield Scorer(TorchSession(ws.model, prefix)), replace(encoding, keep_bos=prefix.length == 0)
        return
    if bundle is None:
        raise UsageError(f"a model that is not built yet has no column '{column}'", hint="build it first")
    built = read_deployed(ws, bundle.path, bundle.graph)
    # 'quantized' is the same recipe without a prefix: smoothed and calibrated for that.
    used = built if column == "quantized-prefix" or not built.prefix.length else prepare(ws, empty)
    model = ws.folded(used.smoothing)
    with simulated(model, used.scheme, used.scales, kv=used.kv):
        yield Scorer(TorchSession(model, used.prefix)), replace(encoding, keep_bos=used.prefix.length == 0)


def _encoding(ws: Workspace, bundle: Bundle | None) -> Encoding:
    if bundle is not None:
        return Encoding.of_bundle(bundle)
    # A copy: the model's own may be asked for padding by others.
    tokenizer = Tokenizer.from_str(ws.model.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return Encoding(tokenizer, ws.model.tokenizer.bos_token_id, ws.model.spec.eos_token_ids, keep_bos=True)


def _agreements(found: Evaluation, bundle: Bundle | None) -> tuple[Agreement, ...]:
    reference = "quantized-prefix" if bundle is not None and bundle.prefix_mode != "none" else "quantized"
    if not {"engine", reference} <= set(found.columns):
        return ()
    texts = [texts_agree(name, row["engine"], row[reference]) for name, row in found.texts.items()]
    return (*texts, *(tasks_agree(row["engine"], row[reference]) for row in found.tasks.values()))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _metric(metric: Metric) -> dict[str, float | None]:
    return {"value": _finite(metric.value), "stderr": _finite(metric.stderr)}


def is_bundle(target: str) -> bool:
    """Return whether a path is a bundle, by the manifest in it."""
    from cushion_deploy.store.manifest import MANIFEST_NAME

    return (Path(target) / MANIFEST_NAME).is_file()
