"""Ctrl-C and SIGTERM: each raises where the command is, and is remembered.

Native code that calls back into Python, such as a reader of tensors, may turn what a signal raised into an error of its
own.
"""

from __future__ import annotations

import signal
from types import FrameType

_received: list[int] = []
"""The signals that nothing has handled yet."""


class Terminated(BaseException):
    """The process received SIGTERM."""


def listen() -> None:
    """Handle SIGTERM and SIGINT; a SIGINT that is ignored, as in a background job of a shell, stays ignored."""
    _received.clear()
    signal.signal(signal.SIGTERM, _on_signal)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _on_signal)


def received() -> int:
    """Return the last signal that nothing has handled; 0 for none."""
    return _received[-1] if _received else 0


def handled() -> None:
    """Forget the signals: the command goes on."""
    _received.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated
