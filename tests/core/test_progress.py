"""Steps of unknown length report the seconds they have taken, and stop doing so when they end."""

from __future__ import annotations

import threading

import pytest

from cushion_deploy.core import progress as module
from cushion_deploy.core.progress import elapsed, titled

Seen = list[tuple[str, int, int]]


@pytest.fixture
def ticked(monkeypatch: pytest.MonkeyPatch) -> tuple[Seen, threading.Event]:
    """Return what is reported, and an event that is set by the third report."""
    monkeypatch.setattr(module, "TICK_SECONDS", 0.01)
    return [], threading.Event()


def test_a_long_step_reports_while_it_runs_and_once_when_it_ends(ticked: tuple[Seen, threading.Event]) -> None:
    seen, third = ticked

    def report(task: str, done: int, total: int) -> None:
        seen.append((task, done, total))
        if len(seen) == 3:
            third.set()

    with elapsed(report, "work"):
        assert third.wait(30), "reports come from beside the work"
    assert all(row[0] == "work" and row[2] == 0 for row in seen[:-1])
    assert seen[-1][1] == seen[-1][2] > 0
    count = len(seen)
    assert not threading.Event().wait(0.05)
    assert len(seen) == count


def test_a_step_that_fails_stops_reporting(ticked: tuple[Seen, threading.Event]) -> None:
    before = threading.active_count()
    with pytest.raises(KeyError), elapsed(lambda *row: ticked[0].append(row), "work"):
        raise KeyError
    assert threading.active_count() == before


def test_a_short_step_reports_that_it_begins_and_nothing_else() -> None:
    seen: Seen = []
    with elapsed(lambda *row: seen.append(row), "work"):
        assert seen == [("work", 0, 0)]
    assert seen == [("work", 0, 0)]


def test_a_title_stands_before_the_name_of_every_task() -> None:
    seen: list[tuple[str, int, int, str]] = []
    report = titled(lambda task, done, total, note="": seen.append((task, done, total, note)), "position 2")
    report("scoring", 3, 4, "a")
    assert seen == [("position 2: scoring", 3, 4, "a")]
