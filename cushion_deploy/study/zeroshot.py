"""Zero-shot cells: one lm-eval task on one way to run the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from cushion_deploy.errors import MissingDependency
from cushion_deploy.evaluate.batches import BATCH
from cushion_deploy.evaluate.zeroshot import ALL, USUAL_NAMES, TaskSuite
from cushion_deploy.stages.base import Given
from cushion_deploy.store import hash_file
from cushion_deploy.study.cells import Cells
from cushion_deploy.study.document import TaskResult
from cushion_deploy.study.stages import Task, Variant


@dataclass
class Tasks:
    """The tasks of a study, each measured separately; they are located and validated on construction.

    Args:
        names: names as given with ``eval --tasks``.
        data: folder with the data that task files name; None for the folder of the task file.
        limit: number of rows of each task; None for all.
        batch: contexts that run together.

    Raises:
        MissingDependency: lm-eval is not installed.
        UsageError: a task does not exist, or a file does not describe a task.
    """

    names: Sequence[str]
    data: Path | None = None
    limit: int | None = None
    batch: int = BATCH
    suites: dict[str, TaskSuite] = field(init=False)

    def __post_init__(self) -> None:
        self.suites = {name: TaskSuite([name], self.data) for name in _units(self.names)}

    def scores(self, cells: Cells, label: str, variant: Variant) -> tuple[TaskResult, ...]:
        """Return the results of every task, one cell per task."""
        found = []
        for unit, suite in self.suites.items():
            name = unit if unit in USUAL_NAMES else Path(unit).name
            files, generation = tuple(_digests(unit, self.data)), cells.pipeline.source.generation_digest
            decided_by = name, self.limit, metadata.version("lm_eval"), files, generation
            title = f"{label}, {Path(unit).stem}"
            value = cells.value(Task(title, cells.pipeline.model, Given(variant), *decided_by, suite, self.batch))
            found += [TaskResult.model_validate(row) for row in value]
        return tuple(found)


def find_tasks(names: Sequence[str], data: Path | None, limit: int | None, batch: int = BATCH) -> Tasks | str:
    """Return the tasks, or the reason why there are none: none was given, or lm-eval is missing.

    Raises:
        UsageError: a given task does not exist.
    """
    if not names:
        return "no task was given: add --tasks with lm-eval names or a folder of task files"
    try:
        return Tasks(names, data, limit, batch)
    except MissingDependency as error:
        return f"{error.message}: {error.hint}"


def _units(names: Sequence[str]) -> list[str]:
    """Return the names and files of single tasks, with ``all`` and folders expanded."""
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
    """Return the digests of the files that a task file may read: those in its folder, and those in the data folder."""
    folders = [folder for folder in (Path(unit).parent if unit.endswith(".yaml") else None, data) if folder]
    return [hash_file(file) for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
