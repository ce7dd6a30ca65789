"""Signals at the worst moment: what belongs together is done, and only then are they handled."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cushion_deploy.store import owned
from cushion_deploy.store.owned import owned_folder
from cushion_deploy.store.uninterrupted import uninterrupted

SIGNALS = [signal.SIGINT, signal.SIGTERM]


class Stopped(BaseException):
    """A signal was handled."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Let both signals raise."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_the_block(number: int) -> None:
    done = []
    with pytest.raises(Stopped) as caught:  # noqa: PT012 - what comes after the signal is the point
        with uninterrupted():
            signal.raise_signal(number)
            done.append("the rest of the block")
        done.append("what comes after it")
    assert done == ["the rest of the block"]
    assert caught.value.args == (number,)
    with pytest.raises(Stopped):
        signal.raise_signal(number)


def test_an_error_in_the_block_is_not_lost() -> None:
    def fail() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError("of the block")

    with pytest.raises(Stopped) as caught:
        fail()
    assert isinstance(caught.value.__context__, ValueError)


def test_another_thread_is_left_alone() -> None:
    found: list[Any] = []

    def run() -> None:
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize("moment", ["_claim", "_discard"])
def test_no_temporary_folder_outlives_a_signal(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal arrives while the folder is made, or while it is removed."""
    real = getattr(owned, moment)

    def signalled(*arguments: Any) -> Any:
        if moment == "_discard":
            signal.raise_signal(signal.SIGTERM)
        result = real(*arguments)
        if moment == "_claim":
            signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(owned, moment, signalled)
    (parent := tmp_path / "tmp").mkdir()
    with pytest.raises(Stopped), owned_folder(parent, "tmp-", tmp_path / "target") as folder:
        (folder / "file").write_text("x")
    assert list(parent.iterdir()) == []
