"""Progress: lines now and then where stderr is no terminal, bars with rate and time left where it is, or silence."""

from __future__ import annotations

import io
import time
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from cushion_deploy.cli import progress as module
from cushion_deploy.cli.progress import LINE_SECONDS, progress


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    value = Clock()
    monkeypatch.setattr(module.time, "monotonic", value)
    return value


def test_lines_come_now_and_then_with_rate_and_time_left(clock: Clock) -> None:
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()) as out, progress() as report:
        report("work", 0, 100)
        for done in range(1, 101):
            clock.now += 1.0
            report("work", done, 100)
    lines = err.getvalue().splitlines()
    # A line every LINE_SECONDS of the 100 seconds, the last of them at the end.
    assert len(lines) == 100 / LINE_SECONDS
    assert lines[0] == "work: 20/100 (1.0/s, 80 s left)"
    assert lines[-1] == "work: 100/100 (1.0/s)"
    assert out.getvalue() == ""


def test_a_note_that_changes_is_one_task(clock: Clock) -> None:
    with redirect_stderr(io.StringIO()) as err, progress() as report:
        for step in range(1, 41):
            clock.now += 1.0
            report("tuning", step, 40, f"loss {1 / step:.3f}")
    assert err.getvalue().splitlines() == [
        "tuning: 21/40 (1.1/s, 18 s left); loss 0.048",
        "tuning: 40/40 (1.0/s); loss 0.025",
    ]


def test_each_task_has_its_own_rate(clock: Clock) -> None:
    with redirect_stderr(io.StringIO()) as err, progress() as report:
        for task, seconds in (("a", 1.0), ("b", 10.0)):
            report(task, 0, 10)
            clock.now += seconds
            report(task, 10, 10)
    assert err.getvalue().splitlines() == ["a: 10/10 (10.0/s)", "b: 10/10 (1.0/s)"]


def test_a_task_of_unknown_length_shows_its_seconds(clock: Clock) -> None:
    with redirect_stderr(io.StringIO()) as err, progress() as report:
        for second in range(1, 46):
            clock.now += 1.0
            report("compiling", second, 0)
        report("compiling", 46, 46)
        report("next", 0, 2)
        clock.now += 1.0
        report("next", 2, 2)
    assert err.getvalue().splitlines() == [
        *("compiling: 21 s", "compiling: 41 s", "compiling: 46 s"),
        "next: 2/2 (2.0/s)",
    ]


def test_quiet_is_silent(clock: Clock) -> None:
    with redirect_stderr(io.StringIO()) as err, progress(quiet=True) as report:
        report("work", 0, 1)
        clock.now += 1000
        report("work", 1, 1)
    assert err.getvalue() == ""


def test_a_terminal_gets_bars_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with redirect_stderr(Terminal()) as err, progress() as report:
        for task in ("first", "second", "first"):
            report(task, 0, 7)
            time.sleep(0.01)
            report(task, 3, 7)
            report(task, 7, 7)
        report("timed", 1, 0)
        report("timed", 33, 33)
    shown: Any = err.getvalue()
    assert "first" in shown
    assert "second" in shown
    assert "7/7" in shown
    assert "33 s" in shown
    assert "33/33" not in shown
    assert "/s" in shown
