"""CUDA as a session needs it: one stream, device memory, copies, CUDA graphs; a failed call raises an exception.

On ``cuda.bindings.runtime``, not on ``cuda.core``: a prefix, a cache row and the last rows of logits are strided, and
cuda.core (1.2) copies and fills whole buffers only. It would be a second dependency beside the bindings.
"""

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
    """A stream of the current device, on which all work is queued in order.

    Raises:
        MissingDependency: cuda-bindings is not installed, or no GPU can be used.
    """

    def __init__(self) -> None:
        """Create the stream."""
        try:
            self._api: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as e:
            raise MissingDependency("running TensorRT engines needs cuda-bindings", hint=INSTALL) from e
        try:
            self.stream = self._call("cudaStreamCreate")
        except (CheckFailed, RuntimeError) as e:  # the bindings raise RuntimeError without a driver
            reason = e.message if isinstance(e, CheckFailed) else str(e)
            raise MissingDependency(
                f"no NVIDIA GPU can be used: {reason}", hint="run the bundle with --engine onnxruntime"
            ) from e
        self._pending: list[Any] = []

    def free_bytes(self) -> int:
        """Return the free device memory in bytes, as counted by the driver."""
        return int(self._call("cudaMemGetInfo")[0])

    def allocate(self, size: int) -> DeviceBuffer:
        """Allocate ``size`` bytes of device memory, at least one; raises CheckFailed if too little is free."""
        size = max(size, 1)
        try:
            return DeviceBuffer(self, int(self._call("cudaMalloc", size)), size)
        except CheckFailed as e:
            free = self.free_bytes()
            raise CheckFailed(
                f"{size / 2**20:,.0f} MiB of device memory cannot be allocated, {free / 2**20:,.0f} MiB are free",
                hint="compile the engine with a smaller --max-context or --max-batch, or free the device",
            ) from e

    def upload(self, array: npt.NDArray[Any], target: DeviceBuffer) -> None:
        """Queue a copy of a host array to the device; the array is kept alive until the next :meth:`synchronize`."""
        array = np.ascontiguousarray(array)
        self._pending.append(array)
        self._copy(target.at(array.nbytes), array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def upload_rows(self, array: npt.NDArray[Any], target: DeviceBuffer, pitch: int) -> None:
        """Queue a copy of a host array ``[rows, ...]`` to rows of a buffer that are ``pitch`` bytes apart."""
        if not array.size:
            return
        array, rows = np.ascontiguousarray(array), len(array)
        width = array.nbytes // rows
        self._pending.append(array)
        there = target.at(pitch * (rows - 1) + width)
        self._copy_rows(there, pitch, array.ctypes.data, width, width, rows, "cudaMemcpyHostToDevice")

    def clear_rows(self, target: DeviceBuffer, offset: int, pitch: int, width: int, rows: int) -> None:
        """Queue zeros for ``width`` bytes at ``offset`` in each of ``rows`` rows that are ``pitch`` bytes apart."""
        if width and rows:
            address = target.at(offset + pitch * (rows - 1) + width) + offset
            self._call("cudaMemset2DAsync", address, pitch, 0, width, rows, self.stream)

    def download_rows(self, source: DeviceBuffer, offset: int, pitch: int, array: npt.NDArray[Any]) -> None:
        """Queue a copy of rows into a host array, which may be read after the next :meth:`synchronize`.

        Args:
            source: device memory.
            offset: byte offset of the first row in it.
            pitch: bytes from one row to the next in it.
            array: contiguous array whose first axis is the rows.
        """
        width = array.nbytes // len(array)
        address = source.at(offset + pitch * (len(array) - 1) + width) + offset
        self._pending.append(array)
        self._copy_rows(array.ctypes.data, width, address, pitch, width, len(array), "cudaMemcpyDeviceToHost")

    def copy_rows(self, source: DeviceBuffer, pitch: int, target: DeviceBuffer, width: int, rows: int) -> None:
        """Queue a copy of the first ``width`` bytes of rows ``pitch`` bytes apart, packed into another buffer."""
        if width and rows:
            here, there = source.at(pitch * (rows - 1) + width), target.at(width * rows)
            self._copy_rows(there, width, here, pitch, width, rows, "cudaMemcpyDeviceToDevice")

    def synchronize(self) -> None:
        """Wait for all queued work; raises CheckFailed if any of it failed."""
        self._call("cudaStreamSynchronize", self.stream)
        self._pending.clear()

    def capture(self, enqueue: Callable[[], None]) -> Any:
        """Capture what ``enqueue`` queues as an executable CUDA graph, without running it.

        Raises:
            CheckFailed: it cannot be captured; the stream is left as it was.
        """
        mode = self._api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads stay unaffected
        graph = None
        try:
            self._call("cudaStreamBeginCapture", self.stream, mode)
            try:
                enqueue()
            finally:
                graph = self._call("cudaStreamEndCapture", self.stream)
            return self._call("cudaGraphInstantiate", graph, 0)
        except BaseException:
            # Otherwise TensorRT would attribute the remaining error to its next kernel.
            self._api.cudaGetLastError()
            raise
        finally:
            if graph is not None:
                with suppress(CheckFailed):
                    self._call("cudaGraphDestroy", graph)

    def launch(self, executable: Any) -> None:
        """Queue a captured graph; the memory that it refers to must still be allocated."""
        self._call("cudaGraphLaunch", executable, self.stream)

    def destroy(self, executable: Any) -> None:
        """Destroy a captured graph."""
        self._call("cudaGraphExecDestroy", executable)

    def free(self, address: int) -> None:
        """Free device memory."""
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
                hint="check `nvidia-smi`; after an error in a kernel, start a new process",
            )
        return values[0] if len(values) == 1 else tuple(values)


class DeviceBuffer:
    """An allocation of device memory that refuses access beyond its end or after :meth:`free`."""

    def __init__(self, cuda: Cuda, address: int, size: int) -> None:
        """Own the allocation at ``address``."""
        self._cuda, self._address, self.size = cuda, address, size

    def at(self, size: int) -> int:
        """Return the address for an access to the first ``size`` bytes; raises RuntimeError if out of bounds."""
        if not self._address:
            raise RuntimeError("device memory was used after it was freed")
        if size > self.size:
            raise RuntimeError(f"access to {size} bytes of a device buffer of {self.size}")
        return self._address

    def free(self) -> None:
        """Free the memory; a second call does nothing."""
        if self._address:
            address, self._address = self._address, 0
            self._cuda.free(address)
