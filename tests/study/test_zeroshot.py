"""Table 2: a cell a task, kept by the task's own files, and left out with a reason where it cannot be run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.errors import MissingDependency
from cushion_deploy.study import zeroshot
from cushion_deploy.study.cells import Variant
from cushion_deploy.study.zeroshot import Tasks, find_tasks

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
Desk = Any
CHOICE = """
task: small_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: choice.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one task and its six rows."""
    path = tmp_path / "tasks"
    path.mkdir()
    (path / "choice.yaml").write_text(CHOICE)
    rows = [
        {"question": text, "choices": [" and then", " the fox", " of it all"], "answer": i % 3}
        for i, text in enumerate(("The dog", "A head", "The quick brown fox", "When nothing", "A few", "It is"))
    ]
    (path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_no_task_and_no_lm_eval_are_reasons_and_not_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise MissingDependency("lm-eval is not installed", hint="pip install it")

    assert "no task was given" in str(find_tasks([], None, None))
    monkeypatch.setattr(zeroshot, "TaskSuite", missing)
    assert find_tasks(["piqa"], None, None) == "lm-eval is not installed: pip install it"


def test_folders_and_all_are_taken_apart(folder: Path) -> None:
    assert zeroshot._units([str(folder), "arc_easy"]) == [str(folder / "choice.yaml"), "arc_easy"]
    assert len(zeroshot._units(["all"])) == 7


def test_a_task_is_a_cell_and_its_files_decide_it(desk: Desk, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")

    def run(limit: int | None = None) -> tuple[Any, bool]:
        cells = desk.cells(tmp_path / "work", search__enabled=False)
        (found,) = Tasks([str(folder)], None, limit).scores(cells, "FP", Variant(cells.empty))
        (cell,) = cells.done.values()
        return found, cell.reused

    first, reused = run()
    assert (first.task, first.metric, first.n, reused) == ("small_choice", "acc", 6, False)
    assert round(6 * first.value) == pytest.approx(6 * first.value)
    assert run() == (first, True)
    assert run(limit=2)[0].n == 2
    (folder / "choice.jsonl").write_text((folder / "choice.jsonl").read_text() * 2)
    second, reused = run()
    assert (second.n, reused) == (12, False)
    assert second.value == pytest.approx(first.value)


def test_the_tokens_that_end_a_text_decide_a_task(desk: Desk, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    model = Path(shutil.copytree(desk.model, tmp_path / "model"))

    def run() -> tuple[bool, ...]:
        cells = replace(desk, model=model).cells(tmp_path / "work", search__enabled=False)
        Tasks([str(folder)], None, 2).scores(cells, "FP", Variant(cells.empty))
        return tuple(cell.reused for cell in cells.done.values())

    assert (run(), run()) == ((False,), (True,))
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert run() == (False,)
