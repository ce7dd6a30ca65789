"""The few calls of the CUDA runtime that a session makes: memory, copies, one stream, graphs; errors as exceptions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from cushion_deploy.errors import CheckFailed, MissingDependency

INSTALL = "pip install 'cushion-deploy[cuda]'"


class Cuda:
    """One stream of the current device; everything is queued on it, in order.

    Raises:
        MissingDependency: cuda-bindings is not installed, or no device can be used.
    """

    def __init__(self) -> None:
        """Create the stream."""
        try:
            self._api: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as e:
            raise MissingDependency("running TensorRT engines needs cuda-bindings", hint=INSTALL) from e
        try:
            self.stream = self._call("cudaStreamCreate")
        except (CheckFailed, RuntimeError) as e:  # without a driver the bindings raise on their own
            reason = e.message if isinstance(e, CheckFailed) else str(e)
            raise MissingDependency(
                f"no NVIDIA GPU can be used: {reason}", hint="run the bundle with --engine onnxruntime"
            ) from e
        self._pending: list[Any] = []

    def free_bytes(self) -> int:
        """Return how much device memory is free, as the driver counts it."""
        return int(self._call("cudaMemGetInfo")[0])

    def allocate(self, size: int) -> DeviceBuffer:
        """Return device memory of at least one byte; raises CheckFailed when there is too little."""
        size = max(size, 1)
        try:
            return DeviceBuffer(self, int(self._call("cudaMalloc", size)), size)
        except CheckFailed as e:
            free = self.free_bytes()
            raise CheckFailed(
                f"{size / 2**20:,.0f} MiB of device memory cannot be had, {free / 2**20:,.0f} MiB are free",
                hint="compile the engine with a smaller --max-context or --max-batch, or free the device",
            ) from e

    def upload(self, array: npt.NDArray[Any], target: DeviceBuffer) -> None:
        """Queue a copy of a host array to the device; the array is kept until the next :meth:`synchronize`."""
        array = np.ascontiguousarray(array)
        self._pending.append(array)
        self._copy(target.at(array.nbytes), array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def upload_rows(self, array: npt.NDArray[Any], target: DeviceBuffer, pitch: int) -> None:
        """Queue a copy of a host array ``[rows, ...]`` to the begin of every ``pitch`` bytes of a buffer."""
        if not array.size:
            return
        array, rows = np.ascontiguousarray(array), len(array)
        width = array.nbytes // rows
        self._pending.append(array)
        there = target.at(pitch * (rows - 1) + width)
        self._copy_rows(there, pitch, array.ctypes.data, width, width, rows, "cudaMemcpyHostToDevice")

    def clear_rows(self, target: DeviceBuffer, offset: int, pitch: int, width: int, rows: int) -> None:
        """Queue zeros for ``width`` bytes from ``offset`` on, in every ``pitch`` bytes of a buffer."""
        if width and rows:
            address = target.at(offset + pitch * (rows - 1) + width) + offset
            self._call("cudaMemset2DAsync", address, pitch, 0, width, rows, self.stream)

    def download_rows(self, source: DeviceBuffer, offset: int, pitch: int, array: npt.NDArray[Any]) -> None:
        """Queue a copy of rows of bytes into a host array, which may be read after the next :meth:`synchronize`.

        Args:
            source: device memory.
            offset: of the first row in it, bytes.
            pitch: from row to row in it, bytes.
            array: contiguous, its first axis the rows.
        """
        width = array.nbytes // len(array)
        address = source.at(offset + pitch * (len(array) - 1) + width) + offset
        self._pending.append(array)
        self._copy_rows(array.ctypes.data, width, address, pitch, width, len(array), "cudaMemcpyDeviceToHost")

    def copy_rows(self, source: DeviceBuffer, pitch: int, target: DeviceBuffer, width: int, rows: int) -> None:
        """Queue a copy of the first ``width`` bytes of every ``pitch`` of a buffer, side by side into another."""
        if width and rows:
            here, there = source.at(pitch * (rows - 1) + width), target.at(width * rows)
            self._copy_rows(there, width, here, pitch, width, rows, "cudaMemcpyDeviceToDevice")

    def synchronize(self) -> None:
        """Wait for everything queued; raises CheckFailed when something of it failed."""
        self._call("cudaStreamSynchronize", self.stream)
        self._pending.clear()

    def record(self, enqueue: Callable[[], None]) -> Any:
        """Return what ``enqueue`` queues as an executable graph; none of it runs.

        Raises:
            CheckFailed: it cannot be recorded; the stream is as it was before.
        """
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may do what they like
        graph = None
        try:
            self._call("cudaStreamBeginCapture", self.stream, mode)
            try:
                enqueue()
            finally:
                graph = self._call("cudaStreamEndCapture", self.stream)
            return self._call("cudaGraphInstantiate", graph, 0)
        except BaseException:
            # TensorRT would take the error that is left behind for one of its next kernel.
            self._api.cudaGetLastError()
            raise
        finally:
            if graph is not None:
                with suppress(CheckFailed):
                    self._call("cudaGraphDestroy", graph)

    def launch(self, recorded: Any) -> None:
        """Queue a recorded graph; the memory that it was recorded with is still there."""
        self._call("cudaGraphLaunch", recorded, self.stream)

    def destroy(self, recorded: Any) -> None:
        """Give a recorded graph back."""
        self._call("cudaGraphExecDestroy", recorded)

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._call("cudaFree", address)

    def close(self) -> None:
        """Destroy the stream."""
        self._call("cudaStreamDestroy", self.stream)

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        if size:
            self._call("cudaMemcpyAsync", target, source, size, self._kind(kind), self.stream)

    def _copy_rows(self, target: int, to: int, source: int, pitch: int, width: int, rows: int, kind: str) -> None:
        self._call("cudaMemcpy2DAsync", target, to, source, pitch, width, rows, self._kind(kind), self.stream)

    def _kind(self, name: str) -> Any:
        return getattr(self._api.cudaMemcpyKind, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._api, name)(*arguments)
        if int(status) != 0:
            raise CheckFailed(
                f"{name} failed: {getattr(status, 'name', status)}",
                hint="see what `nvidia-smi` says; after an error of a kernel start a new process",
            )
        return values[0] if len(values) == 1 else tuple(values)


class DeviceBuffer:
    """A piece of device memory; never read or written beyond its end or after :meth:`free`."""

    def __init__(self, cuda: Cuda, address: int, size: int) -> None:
        """Take over an allocation."""
        self._cuda, self._address, self.size = cuda, address, size

    def at(self, size: int) -> int:
        """Return the address for an access to the first ``size`` bytes; raises RuntimeError where that is a fault."""
        if not self._address:
            raise RuntimeError("device memory was used after it was freed")
        if size > self.size:
            raise RuntimeError(f"access to {size} bytes of a device buffer of {self.size}")
        return self._address

    def free(self) -> None:
        """Give the memory back; a second call does nothing."""
        if self._address:
            address, self._address = self._address, 0
            self._cuda.free(address)
