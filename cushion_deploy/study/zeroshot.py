"""Zero-shot cells: one task of lm-eval on one way to run the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from cushion_deploy.errors import MissingDependency
from cushion_deploy.evaluate.zeroshot import ALL, USUAL_NAMES, TaskSuite, run_tasks
from cushion_deploy.store import hash_file
from cushion_deploy.study.cells import Cells, Variant
from cushion_deploy.study.document import TaskResult


@dataclass
class Tasks:
    """The tasks of a study, each a unit of its own; found and checked when made.

    Args:
        names: as ``eval --tasks`` takes them.
        data: folder with the data that task files name; None for beside them.
        limit: rows of each task; None for all.

    Raises:
        MissingDependency: lm-eval is not installed.
        UsageError: no such task, or a file that describes none.
    """

    names: Sequence[str]
    data: Path | None = None
    limit: int | None = None
    suites: dict[str, TaskSuite] = field(init=False)

    def __post_init__(self) -> None:
        self.suites = {name: TaskSuite([name], self.data) for name in _units(self.names)}

    def scores(self, cells: Cells, label: str, variant: Variant) -> tuple[TaskResult, ...]:
        """Return the results of every task, one cell each."""
        found = []
        for unit in self.suites:
            parents = {
                **variant.parents,
                "task": unit if unit in USUAL_NAMES else Path(unit).name,
                "limit": self.limit,
                "lm_eval": metadata.version("lm_eval"),
                "files": _digests(unit, self.data),
            }
            compute = partial(self._run, cells, unit, label, variant)
            value = cells.cell("task", f"{label}, {Path(unit).stem}", parents, compute)
            found += [TaskResult.model_validate(row) for row in value]
        return tuple(found)

    def _run(self, cells: Cells, unit: str, label: str, variant: Variant) -> list[dict[str, Any]]:
        from tokenizers import Tokenizer

        from cushion_deploy.evaluate.encoding import Encoding
        from cushion_deploy.evaluate.lm_harness import ScorerLM
        from cushion_deploy.evaluate.scorer import Scorer
        from cushion_deploy.modeling.session import TorchSession
        from cushion_deploy.modeling.simulate import simulated

        ws = cells.ws
        model = ws.folded(variant.smoothing)
        tokenizer = Tokenizer.from_str(model.tokenizer.backend_tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # A prefix has taken the place of the beginning-of-sequence token.
        keep_bos = variant.prefix.length == 0
        encoding = Encoding(tokenizer, model.tokenizer.bos_token_id, model.spec.eos_token_ids, keep_bos)
        with simulated(model, variant.scheme, variant.scales) if variant.scheme else nullcontext():
            lm = ScorerLM(Scorer(TorchSession(model, variant.prefix)), encoding, ws.progress, f"tasks: {label}")
            results = run_tasks(lm, self.suites[unit], self.limit)
        return [{"task": r.task, "metric": r.metric, "n": r.n, "value": r.value, "stderr": r.stderr} for r in results]


def find_tasks(names: Sequence[str], data: Path | None, limit: int | None) -> Tasks | str:
    """Return the tasks, or in words why there are none: none was asked for, or lm-eval is missing.

    Raises:
        UsageError: a task that was asked for does not exist.
    """
    if not names:
        return "no task was given: add --tasks with names of lm-eval or a folder of task files"
    try:
        return Tasks(names, data, limit)
    except MissingDependency as error:
        return f"{error.message}: {error.hint}"


def _units(names: Sequence[str]) -> list[str]:
    """Return names and files of single tasks: ``all`` and folders taken apart."""
    found: list[str] = []
    for name in names:
        if name == ALL:
            found += USUAL_NAMES
        elif name not in USUAL_NAMES and Path(name).is_dir() and any(Path(name).glob("*.yaml")):
            found += [str(file) for file in sorted(Path(name).glob("*.yaml"))]
        else:
            found.append(name)
    return found


def _digests(unit: str, data: Path | None) -> list[str]:
    """Return the digests of the files that a task file may read: those beside it, and those of the data folder."""
    folders = [folder for folder in (Path(unit).parent if unit.endswith(".yaml") else None, data) if folder]
    return [hash_file(file) for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
