"""Progress: a line every ten seconds where stderr is no terminal, one live line a stage where it is, or silence."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import click
import pytest

from cushion_deploy.cli import progress as module
from cushion_deploy.cli.progress import LINE_SECONDS, Display, progress
from cushion_deploy.cli.running import clock


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Clock:
    value = Clock()
    monkeypatch.setattr(module.time, "monotonic", value)
    # No beat of its own: a test that wants one calls it.
    monkeypatch.setattr(module, "BEAT_SECONDS", 3600.0)
    return value


@contextmanager
def displayed() -> Iterator[tuple[Display, io.StringIO]]:
    """Yield a display where stderr is no terminal, and what it prints there."""
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()) as out, progress() as report:
        yield report, err
        assert out.getvalue() == ""


def test_lines_come_now_and_then_with_rate_and_time_left(moved: Clock) -> None:
    with displayed() as (report, err):
        report("work", 0, 100)
        for done in range(1, 101):
            moved.now += 1.0
            report("work", done, 100)
    lines = err.getvalue().splitlines()
    # A line every LINE_SECONDS of the 100 seconds, the last of them at the end.
    assert len(lines) == 100 / LINE_SECONDS
    assert lines[0] == "work: 10/100 (1.0/s, 1 min 30 s left)"
    assert lines[-1] == "work: 100/100 (1.0/s)"


def test_a_note_that_changes_is_one_task(moved: Clock) -> None:
    with displayed() as (report, err):
        for step in range(1, 21):
            moved.now += 1.0
            report("tuning", step, 20, f"loss {1 / step:.3f}")
    assert err.getvalue().splitlines() == [
        "tuning: 10/20 (1.1/s, 9 s left); loss 0.100",
        "tuning: 20/20 (1.1/s); loss 0.050",
    ]


def test_each_task_has_its_own_rate(moved: Clock) -> None:
    with displayed() as (report, err):
        for task, seconds in (("a", 1.0), ("b", 10.0)):
            report(task, 0, 10)
            moved.now += seconds
            report(task, 10, 10)
    assert err.getvalue().splitlines() == ["a: 10/10 (10.0/s)", "b: 10/10 (1.0/s)"]


def test_a_slow_task_shows_the_time_of_a_unit(moved: Clock) -> None:
    with displayed() as (report, err):
        for done in range(4):
            report("round", done, 3)
            moved.now += 20.0
    assert err.getvalue().splitlines() == [
        "round: 1/3 (20 s each, 40 s left)",
        "round: 2/3 (20 s each, 20 s left)",
        "round: 3/3 (20 s each)",
    ]


def test_what_begins_is_named_at_once_if_that_is_wanted(moved: Clock) -> None:
    with redirect_stderr(io.StringIO()) as err, progress(at_once=True) as report:
        report("verifying", 0, 0)
        report("loading", 0, 0)
        report("loading", 3, 3)
    assert err.getvalue().splitlines() == ["verifying", "loading", "loading: 3 s"]


def test_a_task_of_unknown_length_shows_its_seconds(moved: Clock) -> None:
    with displayed() as (report, err):
        report("compiling", 0, 0)
        for second in range(1, 26):
            moved.now += 1.0
            report("compiling", second, 0)
        report("compiling", 26, 26)
        report("next", 0, 2)
        moved.now += 1.0
        report("next", 2, 2)
    assert err.getvalue().splitlines() == [
        *("compiling: 10 s", "compiling: 20 s", "compiling: 26 s"),
        "next: 2/2 (2.0/s)",
    ]


def test_a_stage_is_one_line_at_its_end_and_one_every_ten_seconds(moved: Clock) -> None:
    with displayed() as (report, err):
        report.end("sample", 1, 3, reused=True)
        report.begin("search", 2, 3)
        for done in range(1, 101):
            moved.now += 0.01
            report("a short task", done, 100)
        report("a long task", 0, 40)
        for done in range(1, 41):
            moved.now += 0.5
            report("a long task", done, 40)
        report.end("search", 2, 3, reused=False)
    assert err.getvalue().splitlines() == [
        "[1/3] sample: reused from an earlier run",
        "[2/3] search, 10 s: a long task: 18/40 (2.0/s, 11 s left)",
        "[2/3] search, 20 s: a long task: 38/40 (2.0/s, 1 s left)",
        "[2/3] search: done in 21 s",
    ]


def test_a_stage_that_needs_another_goes_on_behind_it(moved: Clock) -> None:
    with displayed() as (report, err):
        report.begin("sample", 1, 2)
        report.begin("convert", 1, 2)
        moved.now += LINE_SECONDS
        report("converting", 1, 2)
        report.end("convert", 1, 2, reused=False)
        moved.now += LINE_SECONDS
        report("sampling", 1, 256)
        report.end("sample", 2, 2, reused=False)
    # Stages are numbered as they end, and the time of one is without that of the others.
    assert err.getvalue().splitlines() == [
        "[1/2] convert, 10 s: converting: 1/2",
        "[1/2] convert: done in 10 s",
        "[2/2] sample, 10 s: sampling: 1/256",
        "[2/2] sample: done in 10 s",
    ]


def test_a_stage_rises_behind_one_that_is_reused(moved: Clock) -> None:
    with displayed() as (report, err):
        report.begin("sample", 1, 2)
        report.end("convert", 1, 2, reused=True)
        moved.now += LINE_SECONDS
        report("sampling", 0, 256)
    assert err.getvalue().splitlines() == [
        "[1/2] convert: reused from an earlier run",
        "[2/2] sample, 10 s: sampling: 0/256",
    ]


def test_a_task_that_is_done_is_not_shown_as_running(moved: Clock) -> None:
    with displayed() as (report, err):
        report.begin("search", 1, 1)
        report("comparing", 4, 4)
        moved.now += LINE_SECONDS
        report.beat()  # type: ignore[attr-defined]
    assert err.getvalue() == "[1/1] search, 10 s: after comparing\n"


def test_a_short_task_of_unknown_length_is_not_shown_as_running(moved: Clock) -> None:
    with displayed() as (report, err):
        report("reading", 0, 0)
        moved.now += LINE_SECONDS
        report.beat()  # type: ignore[attr-defined]
    assert err.getvalue() == "after reading\n"


def test_nothing_that_runs_outside_of_stages_is_silent(moved: Clock) -> None:
    @click.command("doctor")
    def command() -> None:
        with progress() as report:
            report("loading weights", 3, 3)
            for _ in range(2):
                moved.now += LINE_SECONDS
                report.beat()  # type: ignore[attr-defined]

    with redirect_stderr(io.StringIO()) as err:
        command.main([], prog_name="doctor", standalone_mode=False)
    assert err.getvalue().splitlines() == ["loading weights: 3/3", "doctor, 10 s", "doctor, 20 s"]


def test_a_stage_that_reports_nothing_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = threading.Event()

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            printed.set()
            return super().write(text)

    monkeypatch.setattr(module, "LINE_SECONDS", 0.01)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    with redirect_stderr(Watched()) as err, progress() as report:
        report.begin("parity", 13, 13)
        assert printed.wait(30), "lines come from beside the work"
    assert err.getvalue().startswith("[13/13] parity, 0 s\n")


def test_a_stage_that_fails_is_over(moved: Clock) -> None:
    with displayed() as (report, err):
        report.begin("search", 1, 1)
        report.stop()
        report("something else", 0, 2)
        moved.now += 20
        report("something else", 1, 2)
    assert err.getvalue() == "something else: 1/2 (20 s each, 20 s left)\n"


def test_only_a_counted_stage_says_that_it_is_reused(moved: Clock) -> None:
    with displayed() as (report, err):
        report.end("tokenizer", 0, 0, reused=True)
        report.begin("search", 0, 0)
        moved.now += 125
        report.end("search", 0, 0, reused=False)
    assert err.getvalue() == "search: done in 2 min 05 s\n"


def test_quiet_is_silent(moved: Clock) -> None:
    with redirect_stderr(io.StringIO()) as err, progress(quiet=True) as report:
        report.begin("search", 1, 1)
        report("work", 0, 1)
        moved.now += 1000
        report("work", 1, 1)
        report.end("search", 1, 1, reused=False)
    assert err.getvalue() == ""


def test_a_terminal_has_one_live_line_and_keeps_what_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with redirect_stderr(Terminal()) as err, progress() as report:
        report.end("sample", 1, 2, reused=True)
        report.begin("search", 2, 2)
        for task in ("first", "second"):
            report(task, 3, 7)
            report.live.refresh()  # type: ignore[attr-defined]
            assert sum(row.visible for row in report.live.tasks) == 1  # type: ignore[attr-defined]
        report.end("search", 2, 2, reused=False)
        assert [row.description for row in report.live.tasks if row.visible] == ["working"]  # type: ignore[attr-defined]
        report("alone", 7, 7)
    shown = err.getvalue()
    assert "[2/2] search: second" in shown
    assert "3/7" in shown
    kept = [line.split("\r")[-1].split("\x1b[2K")[-1] for line in shown.split("\n")]
    for line in ("[1/2] sample: reused from an earlier run", "[2/2] search: done in 0 s", "alone: 7/7"):
        assert line in kept


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (3_725, "1 h 02 min")]
)
def test_times_are_short(seconds: float, words: str) -> None:
    assert clock(seconds) == words
