"""Zero-shot tasks of lm-eval: found by name, file or folder, run on a model, and scored."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.progress import Progress, elapsed, silent
from cushion_deploy.core.statistics import standard_error
from cushion_deploy.errors import CushionError, MissingDependency, UsageError, unknown_choice

USUAL_NAMES = {
    "lambada": "lambada_openai",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "rte": "rte",
    "copa": "copa",
}
"""The seven tasks of the paper, mapped to their names in lm-eval."""
FOLDERS = ("lambada", "hellaswag", "piqa", "winogrande", "openbookqa", "glue/rte", "super_glue/copa")
"""Folders of those tasks in lm-eval."""
ALL = "all"
FEWSHOT_SEED = 1234
"""The default of lm-eval."""
_LOCAL = "pass --tasks FOLDER with task files (.yaml) whose data is local, and --task-data FOLDER for the data"


@dataclass(frozen=True)
class Metric:
    """A value with its standard error; None if it is unknown."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScore:
    """The score of one model on one task.

    Attributes:
        task: name of the task in lm-eval.
        metric: the main metric: ``acc`` if the task has it.
        n: number of rows.
        metrics: all metrics by name.
    """

    task: str
    metric: str
    n: int
    metrics: Mapping[str, Metric]

    @property
    def value(self) -> float:
        """Value of the main metric."""
        return self.metrics[self.metric].value

    @property
    def stderr(self) -> float | None:
        """Standard error of the main metric."""
        return self.metrics[self.metric].stderr


def require_lm_eval() -> None:
    """Raise MissingDependency, with the install command, if lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as e:
        raise missing_lm_eval() from e


def missing_lm_eval() -> MissingDependency:
    """Return the error for a missing lm-eval."""
    return MissingDependency("lm-eval is not installed", hint="pip install 'cushion-deploy[eval]'")


class TaskSuite:
    """The requested tasks, found and checked; loaded again for every model, because lm-eval modifies loaded tasks.

    Args:
        names: any mixture of lm-eval task names, the short names of ``USUAL_NAMES``, ``all`` for all of those,
            ``.yaml`` files, and folders of such files. A task file can run Python functions that are stored next to it.
        data: first folder in which data files of task files are looked up, before the folder of the task file and
            the current folder.

    Raises:
        MissingDependency: lm-eval is not installed.
        UsageError: a task does not exist, or a file does not describe one.
    """

    def __init__(self, names: Sequence[str], data: Path | None = None) -> None:
        """Find every task without loading it."""
        require_lm_eval()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        wanted = [name for given in names for name in (USUAL_NAMES if given == ALL else [given])]
        self._specs: list[str | dict[str, Any]] = []
        registered: list[str] = []
        for name in wanted:
            files = _task_files(name)
            self._specs += [_read_task(file, data) for file in files]
            if not files:
                registered.append(USUAL_NAMES.get(name, name))
        self._manager = _manager(registered)
        for name in registered:
            if name not in self._manager.all_tasks:
                error = unknown_choice("task", name, [*USUAL_NAMES, ALL])
                raise UsageError(
                    error.message, hint=f"{error.hint}; or name another task of lm-eval, or a folder of .yaml files"
                )
        self._specs += registered
        if not self._specs:
            raise UsageError("no task was given", hint=f"choose from: {', '.join([*USUAL_NAMES, ALL])}")

    def load(self) -> Any:
        """Return the tasks in the form that lm-eval's evaluator expects.

        Raises:
            MissingDependency: the data of a task cannot be fetched.
            UsageError: the data of a task cannot be read.
        """
        import datasets

        datasets.disable_progress_bars()
        try:
            loaded = self._manager.load(copy.deepcopy(self._specs))
        except CushionError:
            raise
        except Exception as e:  # lm-eval, datasets, the hub client and its transport share no base class
            raise _load_error(e) from e
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded


def run_tasks(
    lm: Any, suite: TaskSuite, limit: int | None = None, *, chat: bool = False, progress: Progress = silent
) -> list[TaskScore]:
    """Return the scores of a model, one per task, in the order of the suite.

    Args:
        lm: an lm-eval model, such as :class:`~cushion_deploy.evaluate.lm_harness.ScorerLM`.
        suite: the tasks.
        limit: rows per task; None for all.
        chat: whether every context is a user's message in the model's chat template.
        progress: told that the data is read, which may have to be fetched.

    Raises:
        UsageError: ``chat``, and the model has no chat template.
    """
    from lm_eval.evaluator import evaluate

    with elapsed(progress, "reading the data of the tasks"):
        loaded = suite.load()
    # Without bootstrapping, which takes minutes: standard errors follow from the rows in closed form.
    results = evaluate(
        lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True, apply_chat_template=chat
    )
    return [_score(name, results["results"][name], results["samples"][name]) for name in loaded["tasks"]]


def mean_accuracy(scores: Sequence[TaskScore]) -> Metric:
    """Return the mean of the main metrics over tasks, and its standard error, treating tasks as independent."""
    errors = [s.stderr for s in scores]
    known = [e for e in errors if e is not None]
    total = math.sqrt(sum(e * e for e in known)) / len(scores) if len(known) == len(errors) else None
    return Metric(sum(s.value for s in scores) / len(scores), total)


def _score(name: str, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> TaskScore:
    kept = [row for row in rows if row["filter"] == rows[0]["filter"]]
    metrics = {}
    for metric in kept[0]["metrics"]:
        value = float(summary[f"{metric},{kept[0]['filter']}"])
        try:
            values = np.array([float(row[metric]) for row in kept], dtype=np.float32)
        except (TypeError, ValueError):  # pairs of numbers, which only lm-eval can aggregate
            metrics[metric] = Metric(value, None)
            continue
        error = standard_error(values)
        if metric == "perplexity":
            error *= value
        elif not math.isclose(value, float(values.mean()), rel_tol=1e-4, abs_tol=1e-6):
            error = math.nan
        metrics[metric] = Metric(value, None if math.isnan(error) else error)
    return TaskScore(name, "acc" if "acc" in metrics else next(iter(metrics)), len(kept), metrics)


def _manager(names: Sequence[str]) -> Any:
    """Return a task manager that knows these lm-eval tasks, if there is one."""
    import lm_eval.tasks as builtin

    root = Path(builtin.__file__).parent
    few = builtin.TaskManager(include_defaults=False, include_path=[root / f for f in FOLDERS] if names else None)
    if set(names) <= set(few.all_tasks):
        return few
    # lm-eval has about ten thousand task files, which take most of a minute to read.
    return builtin.TaskManager()


def _task_files(name: str) -> list[Path]:
    path = Path(name)
    if path.suffix == ".yaml":
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="pass an lm-eval task file")
        return [path]
    # A name of a task wins over a folder of that name; ./piqa is the folder.
    if not path.is_dir() or name in USUAL_NAMES:
        return []
    files = sorted(path.glob("*.yaml"))
    if not files:
        raise UsageError(f"{path} contains no .yaml file", hint="pass a folder of lm-eval task files")
    return files


def _read_task(file: Path, data: Path | None) -> dict[str, Any]:
    import yaml  # what load_yaml of lm-eval raises
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = load_yaml(file.resolve(), resolve_func=True)
    except (yaml.YAMLError, ImportError, AttributeError, ValueError, OSError) as e:
        raise UsageError(f"{file} cannot be read as a task: {e}", hint="see lm-eval's guide to new tasks") from e
    if not isinstance(found, dict) or not isinstance(found.get("task"), str):
        raise UsageError(f"{file} does not describe a single task", hint="use files with `task: NAME`")
    config: dict[str, Any] = dict(found)
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        folders = [folder for folder in (data, file.parent, Path()) if folder is not None]
        config["dataset_kwargs"] = {**kwargs, "data_files": _local(kwargs["data_files"], folders, file)}
    return config


def _local(names: Any, folders: Sequence[Path], file: Path) -> Any:
    """Return ``data_files`` with every file name replaced by the path of the file."""
    if isinstance(names, dict):
        return {split: _local(value, folders, file) for split, value in names.items()}
    if isinstance(names, list):
        return [_local(value, folders, file) for value in names]
    if "://" in names:
        return names
    for folder in folders:
        if (folder / names).is_file():
            return str((folder / names).resolve())
    raise UsageError(
        f"{file} needs {names}, which is in none of {', '.join(str(f.resolve()) for f in folders)}",
        hint="pass the folder that contains the data of the tasks with --task-data FOLDER",
    )


def _load_error(error: Exception) -> CushionError:
    """Return the error for a task that failed to load: no network, or a broken task."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    words = ("connect", "offline", "network", "resolve", "unreachable", "timed out", "proxy", "hub")
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if any(isinstance(e, ConnectionError | TimeoutError) or any(w in str(e).lower() for w in words) for e in chain):
        return MissingDependency(
            f"the data of a task cannot be fetched: {first:.300}", hint=f"check the network, or {_LOCAL}"
        )
    return UsageError(f"a task cannot be loaded: {type(error).__name__}: {first:.300}", hint=_LOCAL)
