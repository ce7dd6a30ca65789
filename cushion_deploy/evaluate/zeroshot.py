"""Zero-shot tasks through lm-eval: find them by name, file or folder, run them, and read the scores."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.errors import CushionError, MissingDependency, UsageError, unknown_choice
from cushion_deploy.evaluate.perplexity import standard_error

USUAL_NAMES = {
    "lambada": "lambada_openai",
    "hellaswag": "hellaswag",
    "piqa": "piqa",
    "winogrande": "winogrande",
    "openbookqa": "openbookqa",
    "rte": "rte",
    "copa": "copa",
}
"""The seven tasks of the paper, and what lm-eval calls them."""
FOLDERS = ("lambada", "hellaswag", "piqa", "winogrande", "openbookqa", "glue/rte", "super_glue/copa")
"""Where those tasks lie among lm-eval's."""
ALL = "all"
FEWSHOT_SEED = 1234
"""lm-eval's own default."""
_LOCAL = "give --tasks FOLDER with task files (.yaml) whose data is local, and --task-data FOLDER for the data"


@dataclass(frozen=True)
class Metric:
    """A value with its standard error; None where none is known."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScore:
    """What one model reached in one task.

    Attributes:
        task: lm-eval's name of it.
        metric: the main metric: ``acc`` where the task has it.
        n: rows.
        metrics: every metric by name.
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
    """Raise MissingDependency, with the install line, where lm-eval is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as e:
        raise missing_lm_eval() from e


def missing_lm_eval() -> MissingDependency:
    """Return the error for an absent lm-eval."""
    return MissingDependency("lm-eval is not installed", hint="pip install 'cushion-deploy[eval]'")


class TaskSuite:
    """Tasks that were asked for, found and checked; loaded afresh for every model, because lm-eval fills them.

    Args:
        names: names of lm-eval, the short names of ``USUAL_NAMES``, ``all`` for those, ``.yaml`` files, and
            folders of such files, in any mixture. A task file may name Python functions beside it, which run.
        data: where bare file names in task files are looked for first; then beside the task file, then here.

    Raises:
        MissingDependency: lm-eval is not installed.
        UsageError: no such task, or a file that describes none.
    """

    def __init__(self, names: Sequence[str], data: Path | None = None) -> None:
        """Find every task; none is loaded yet."""
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
                raise UsageError(error.message, hint=f"{error.hint}; or another task of lm-eval, or a folder of .yaml")
        self._specs += registered
        if not self._specs:
            raise UsageError("no task was given", hint=f"choose from: {', '.join([*USUAL_NAMES, ALL])}")

    def load(self) -> Any:
        """Return the tasks as lm-eval's evaluator takes them.

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


def run_tasks(lm: Any, suite: TaskSuite, limit: int | None = None) -> list[TaskScore]:
    """Return the scores of a model, one a task, in the order of the suite.

    Args:
        lm: an lm-eval model, such as :class:`~cushion_deploy.evaluate.lm_harness.ScorerLM`.
        suite: the tasks.
        limit: rows of each; None for all.
    """
    from lm_eval.evaluator import evaluate

    loaded = suite.load()
    # Bootstraps off: they take processes and minutes, and standard errors follow from the rows in closed form.
    results = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    return [_score(name, results["results"][name], results["samples"][name]) for name in loaded["tasks"]]


def mean_accuracy(scores: Sequence[TaskScore]) -> Metric:
    """Return the plain mean of the main metrics over tasks, and its standard error; tasks are independent."""
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
        except (TypeError, ValueError):  # pairs of numbers: lm-eval aggregates them in its own way
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
    """Return a task manager that knows these tasks of lm-eval if any does."""
    import lm_eval.tasks as builtin

    root = Path(builtin.__file__).parent
    few = builtin.TaskManager(include_defaults=False, include_path=[root / f for f in FOLDERS] if names else None)
    if set(names) <= set(few.all_tasks):
        return few
    # All of them are some ten thousand files, which takes most of a minute to read.
    return builtin.TaskManager()


def _task_files(name: str) -> list[Path]:
    path = Path(name)
    if path.suffix == ".yaml":
        if not path.is_file():
            raise UsageError(f"{path} does not exist", hint="give a task file of lm-eval")
        return [path]
    # A folder that happens to be called like a task is not it: give ./piqa for the folder.
    if not path.is_dir() or name in USUAL_NAMES:
        return []
    files = sorted(path.glob("*.yaml"))
    if not files:
        raise UsageError(f"{path} holds no .yaml file", hint="give a folder of lm-eval task files")
    return files


def _read_task(file: Path, data: Path | None) -> dict[str, Any]:
    import yaml  # what load_yaml of lm-eval raises
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = load_yaml(file.resolve(), resolve_func=True)
    except (yaml.YAMLError, ImportError, AttributeError, ValueError, OSError) as e:
        raise UsageError(f"{file} is no readable task: {e}", hint="see lm-eval's guide to new tasks") from e
    if not isinstance(found, dict) or not isinstance(found.get("task"), str):
        raise UsageError(f"{file} describes no single task", hint="give files with `task: NAME`")
    config: dict[str, Any] = dict(found)
    kwargs = config.get("dataset_kwargs")
    if isinstance(kwargs, dict) and "data_files" in kwargs:
        folders = [folder for folder in (data, file.parent, Path()) if folder is not None]
        config["dataset_kwargs"] = {**kwargs, "data_files": _local(kwargs["data_files"], folders, file)}
    return config


def _local(names: Any, folders: Sequence[Path], file: Path) -> Any:
    """Return ``data_files`` with every bare name replaced by the path of the file."""
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
        f"{file} reads {names}, which is not in {' nor '.join(str(f.resolve()) for f in folders)}",
        hint="say with --task-data FOLDER where the data of the tasks lies",
    )


def _load_error(error: Exception) -> CushionError:
    """Return what a failed load means: no network, or a task that is broken."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    words = ("connect", "offline", "network", "resolve", "unreachable", "timed out", "proxy", "hub")
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if any(isinstance(e, ConnectionError | TimeoutError) or any(w in str(e).lower() for w in words) for e in chain):
        return MissingDependency(f"the data of a task cannot be fetched: {first:.300}", hint=f"no network? {_LOCAL}")
    return UsageError(f"a task cannot be loaded: {type(error).__name__}: {first:.300}", hint=_LOCAL)
