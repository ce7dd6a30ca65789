"""CUDA graphs of the fake device: captured work runs again at each launch, on the memory of that moment."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, IntEnum
from typing import NamedTuple


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorIllegalAddress = 700
    cudaErrorStreamCaptureInvalidated = 901


class Mode(Enum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class Work(NamedTuple):
    """Something queued: ``check`` fails where its memory is gone, ``run`` does it."""

    check: Callable[[], None]
    run: Callable[[], None]


class FakeGraphs:
    """The graph calls of `cuda.bindings.runtime`; what is recorded is one list of :class:`Work`."""

    cudaStreamCaptureMode = Mode

    def __init__(self) -> None:
        self.queue: list[Callable[[], None]] = []
        self.streams: set[int] = set()
        self.recording: list[Work] | None = None
        self.invalidated = False
        self.last_error = 0
        self.graphs: dict[int, list[Work]] = {}
        self.executables: dict[int, list[Work]] = {}
        self.recorded, self.launched = 0, 0

    def submit(self, work: Work) -> None:
        """Queue work, or record it where the stream is being recorded."""
        if self.recording is None:
            work.check()
            self.queue.append(work.run)
        else:
            self.recording.append(work)

    def require_not_recording(self) -> None:
        assert self.recording is None, "a call that cannot be recorded"

    def cudaStreamBeginCapture(self, stream: int, mode: Mode) -> tuple[Status]:
        assert stream in self.streams
        assert mode is not Mode.cudaStreamCaptureModeGlobal, "another thread could break it"
        self.require_not_recording()
        self.recording, self.invalidated = [], False
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, int | None]:
        assert stream in self.streams
        assert self.recording is not None
        work, self.recording = self.recording, None
        if self.invalidated:
            self.last_error = Status.cudaErrorStreamCaptureInvalidated
            return Status.cudaErrorStreamCaptureInvalidated, None
        handle = 100 + self.recorded
        self.graphs[handle] = work
        return Status.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, int]:
        assert flags == 0
        self.require_not_recording()
        self.executables[graph + 1000] = self.graphs[graph]
        self.recorded += 1
        return Status.cudaSuccess, graph + 1000

    def cudaGraphDestroy(self, graph: int) -> tuple[Status]:
        del self.graphs[graph]
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, executable: int, stream: int) -> tuple[Status]:
        assert stream in self.streams
        self.require_not_recording()
        assert executable in self.executables, "launched before it was instantiated or after it was destroyed"
        for work in self.executables[executable]:
            self.submit(work)
        self.launched += 1
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: int) -> tuple[Status]:
        work = self.executables.pop(executable)
        assert not any(item.run in self.queue for item in work), "a graph was destroyed while it was queued"
        return (Status.cudaSuccess,)

    def cudaGetLastError(self) -> tuple[int]:
        found, self.last_error = self.last_error, 0
        return (found,)
