"""Run commands of cushion-deploy as forks of a process that has imported their libraries, which takes most of a start.

A child is a process of its own: it gets the signals, and dies of SIGKILL, as any other. Its reports have no figures,
which would take half of its time and are written as the other files of a report are.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

MODULES = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "onnxruntime",
    "onnx_ir",
    "matplotlib.figure",
    "cushion_deploy.report.figures",
    "cushion_deploy.report.page",
    "cushion_deploy.cli.main",
    "cushion_deploy.cli.build",
    "cushion_deploy.export.write",
    "cushion_deploy.parity.climb",
    "cushion_deploy.parity.reference",
)
CRASHED = 71
"""Exit code of a child in which an exception escaped from the command line, which must never happen."""


def import_libraries() -> None:
    """Import what a build imports, with one thread each; call it before the first :func:`start`."""
    os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1", HF_HUB_OFFLINE="1", CUSHION_CACHE_DIR="")
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # a child that collects garbage would look at, and copy, every object of these libraries


@dataclass
class Child:
    """A running command.

    Attributes:
        pid: its process, which leads a group of its own.
        log: the file with its output.
        code: its exit code, negative for a signal; None until a wait has found it.
    """

    pid: int
    log: Path
    code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """Return the exit code; None if the command still runs after ``seconds``."""
        end = time.monotonic() + seconds
        while self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                break
            else:
                time.sleep(0.002)
        return self.code

    def finish(self, seconds: float = 300.0) -> int:
        """Return the exit code; a command that runs longer than ``seconds`` is killed, and its code is -9."""
        code = self.wait(seconds)
        if code is None:
            self.send(signal.SIGKILL)
            code = self.wait(seconds)
        return -signal.SIGKILL if code is None else code

    def send(self, number: int) -> None:
        """Send a signal to the command and to all processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    @property
    def output(self) -> str:
        """What the command has printed on stdout and stderr."""
        return self.log.read_text(errors="replace")


def start(arguments: Sequence[str | Path], log: Path) -> Child:
    """Start ``cushion-deploy`` with arguments; its output goes to ``log``."""
    pid = os.fork()
    if pid == 0:
        _become_command([str(argument) for argument in arguments], log)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # the child may be faster
        os.setpgid(pid, pid)
    return Child(pid, log)


def _become_command(arguments: list[str], log: Path) -> None:
    code = CRASHED
    try:
        os.setpgid(0, 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from cushion_deploy.cli.main import main
        from cushion_deploy.report import figures

        with mock.patch.object(figures, "draw_figures", return_value={}):
            main(arguments)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else CRASHED
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
