"""Progress of a build: every stage says what it does, every rung of the ladder too, and no name is used twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cushion_deploy.recipe import Recipe
from cushion_deploy.report import Report
from cushion_deploy.stages.run import Run
from cushion_deploy.store import StageStore
from cushion_deploy.verbs.build import build

SETTINGS: dict[str, object] = {
    "engines": ["onnxruntime"],
    "search.ship": "auto",
    "search.text_tokens": 64,
    "search.random_candidates": 8,
    "search.screen_candidates": 8,
    "search.audit_tokens": 4,
    "calibration.windows": 4,
    "calibration.window": 64,
    "evaluation.window": 64,
    "evaluation.max_tokens": 256,
    "parity.tokens": 32,
    "parity.decode_tokens": 2,
}


@dataclass
class Recorder:
    """Writes down every report of every stage, in order: stage, task, done, total."""

    stages: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    reports: list[tuple[str, str, int, int]] = field(default_factory=list)

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        self.reports.append((self.stages[-1] if self.stages else "", task, done, total))

    def begin(self, stage: str, number: int, total: int) -> None:
        assert 1 <= number <= total
        self.stages.append(stage)

    def end(self, stage: str, number: int, total: int, *, reused: bool) -> None:
        (self.reused if reused else self.ran).append(stage)
        if not reused:
            assert self.stages.pop() == stage

    def stop(self) -> None:
        self.stages.pop()

    @property
    def tasks(self) -> dict[tuple[str, str], list[tuple[int, int]]]:
        """What was reported of every task of every stage; the seconds of one of unknown length are left out."""
        found: dict[tuple[str, str], list[tuple[int, int]]] = {}
        unknown = {(stage, task) for stage, task, _, total in self.reports if not total}
        for stage, task, done, total in self.reports:
            counted = found.setdefault((stage, task), [])
            if (stage, task) not in unknown:
                counted.append((done, total))
        return found


Again = Callable[[], tuple[Recorder, Report]]


@pytest.fixture(scope="module")
def again(planted_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Again:
    """Return a function that builds, as in a process of its own, with one work folder."""
    folder = tmp_path_factory.mktemp("progress")
    (folder / "calib.txt").write_text("The quick brown fox jumps over the lazy dog; the dog sleeps. " * 24)
    (folder / "eval.txt").write_text("When nothing else is worth attending to, a head attends to the first. " * 12)
    data = {"calibration.data": str(folder / "calib.txt"), "evaluation.data": str(folder / "eval.txt")}
    recipe = Recipe().merged({"model": str(planted_folder), **data, **SETTINGS})

    def build_again() -> tuple[Recorder, Report]:
        recorder = Recorder()
        run = Run(StageStore(folder / "work"), recorder, watcher=recorder)
        return recorder, build(recipe, run, folder / "out")

    return build_again


@pytest.fixture(scope="module")
def built(again: Again) -> tuple[Recorder, Report]:
    """Return what the first build reported, and its report; it finds a prefix, so that nothing is left out."""
    recorder, report = again()
    assert report.search is not None
    assert report.search.token_ids
    return recorder, report


def test_no_two_tasks_of_a_stage_have_one_name(built: tuple[Recorder, Report]) -> None:
    tasks = built[0].tasks
    for (stage, task), counted in tasks.items():
        assert len({total for _, total in counted}) <= 1, f"{stage}: '{task}' is of different lengths: {counted}"
        done = [count for count, _ in counted]
        assert done == sorted(set(done)), f"{stage}: '{task}' begins again: {counted}"
        assert not counted or done[-1] == counted[0][1], f"{stage}: '{task}' does not end: {counted}"


def test_every_rung_of_the_ladder_reports(built: tuple[Recorder, Report]) -> None:
    recorder, report = built
    told = [task for stage, task in recorder.tasks if stage == "parity"]
    rungs = list(dict.fromkeys(row.rung for row in report.parity))
    assert len(rungs) > 6
    for rung in rungs:
        assert any(task.startswith(rung) for task in told), f"nothing is reported on rung '{rung}'"
    # In the order of the ladder, so that a task is named while it runs.
    named = [next(rung for rung in rungs if task.startswith(rung)) for task in told if task.startswith(tuple(rungs))]
    assert list(dict.fromkeys(named)) == rungs


def test_every_stage_that_runs_the_model_reports(built: tuple[Recorder, Report]) -> None:
    recorder, _ = built
    silent = set(recorder.ran) - {stage for stage, _ in recorder.tasks}
    assert silent <= {"tokenizer", "embedding"}
    assert recorder.reports[0][1].startswith("reading "), "hashing a large checkpoint takes minutes"
    assert [task for stage, task in recorder.tasks if not stage][-1] == "hashing and publishing the bundle"
    assert not recorder.stages


def test_a_second_build_says_that_every_stage_is_reused(again: Again, built: tuple[Recorder, Report]) -> None:
    recorder, _ = again()
    assert recorder.ran == []
    assert recorder.reused == built[0].ran
