"""Run one publication or stage per system call that changes the disk, and kill the process with SIGKILL there.

Usage: ``killed_everywhere.py {publish,stage} FOLDER``. Point k runs in ``FOLDER/<k>``; the last one finished unkilled.
Not a test by itself: the tests look at the folders afterwards.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cushion_deploy.store import StageStore, publish, staging_area

CALLS = ("mkdir", "rename", "fsync", "unlink", "rmdir")


def write_bundle(folder: Path, text: str) -> None:
    """Publish a bundle of two files to ``folder/out``."""
    with staging_area(folder / "out") as staged:
        (staged / "model.onnx").write_text(text)
        (staged / "report").mkdir()
        (staged / "report" / "report.json").write_text(text)
        publish(staged, folder / "out", {"text": text}, {})


def write_stage(folder: Path, text: str) -> None:
    """Write the stage 'search', with a scratch folder, in the work folder ``folder``."""
    store = StageStore(folder)
    with store.lock():
        (store.scratch("search", "k") / "scores").write_text(text)
        with store.write("search", "k") as staged:
            (staged / "prefix").write_text(text)


def kill_at(point: int) -> None:
    """Make the process kill itself right before its ``point``-th call that changes the disk."""
    count = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))


def main(kind: str, root: Path) -> None:
    """Go through the kill points until a run ends by itself."""
    write = {"publish": write_bundle, "stage": write_stage}[kind]
    for point in range(1000):
        folder = root / str(point)
        folder.mkdir()
        write(folder, "old")
        child = os.fork()
        if child == 0:
            kill_at(point)
            write(folder, "new")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
    sys.exit("a run that is never finished")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
