"""Which tasks are meant, where their data is, and what is said when they cannot be had."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.errors import ExitCode, MissingDependency, UsageError
from cushion_deploy.evaluate.zeroshot import USUAL_NAMES, TaskSuite

quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_without_lm_eval_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependency) as caught:
        TaskSuite(["piqa"])
    assert caught.value.exit_code == ExitCode.MISSING
    assert "pip install 'cushion-deploy[eval]'" in caught.value.hint


@quiet
def test_a_folder_is_all_its_tasks_and_a_file_is_one(tiny_tasks: tuple[Path, Path]) -> None:
    folder, data = tiny_tasks
    assert list(TaskSuite([str(folder)], data).load()["tasks"]) == ["tiny_choice", "tiny_last_word"]
    assert list(TaskSuite([str(folder / "words.yaml")], data).load()["tasks"]) == ["tiny_last_word"]


@quiet
def test_data_is_also_looked_for_beside_the_task_file(tiny_tasks: tuple[Path, Path]) -> None:
    folder, data = tiny_tasks
    with pytest.raises(UsageError, match=r"choice.jsonl") as caught:
        TaskSuite([str(folder / "choice.yaml")])
    assert "--task-data" in caught.value.hint
    (data / "choice.jsonl").rename(folder / "choice.jsonl")
    rows = TaskSuite([str(folder / "choice.yaml")]).load()["tasks"]["tiny_choice"].validation_docs()
    assert len(rows) == 6


@quiet
def test_an_unknown_task_lists_the_valid_ones(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import lm_eval.tasks

    right = lm_eval.tasks.TaskManager
    # Reading all of lm-eval's tasks takes most of a minute: an empty list of them serves.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: right(**{"include_defaults": False, **options}))
    with pytest.raises(UsageError, match="unknown task 'piqqa'") as caught:
        TaskSuite(["piqqa"])
    assert all(name in caught.value.hint for name in USUAL_NAMES)


@quiet
def test_the_usual_names_are_tasks_of_lm_eval(no_cache: None) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    suite: Any = TaskSuite(["all"])
    assert suite._specs == list(USUAL_NAMES.values())


@quiet
def test_no_network_points_to_local_tasks(no_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import datasets

    def unreachable(*args: Any, **more: Any) -> Any:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(MissingDependency) as caught:
        TaskSuite(["piqa"]).load()
    assert "--tasks FOLDER" in caught.value.hint


@quiet
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a task"),
        ("group: g\n", "does not describe a single task"),
        ("task: t\nx: !function nope.f\n", "cannot be read as a task"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path: Path, no_cache: None, text: str, message: str) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        TaskSuite([str(tmp_path / "t.yaml")])


@quiet
def test_files_and_folders_that_are_not_there_are_refused(tmp_path: Path, no_cache: None) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"contains no \.yaml"):
        TaskSuite([str(tmp_path / "empty")])
    with pytest.raises(UsageError, match="does not exist"):
        TaskSuite([str(tmp_path / "absent.yaml")])
