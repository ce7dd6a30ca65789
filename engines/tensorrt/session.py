"""TensorRT and TensorRT-RTX as a decoder session: one plan, its profiles, and caches in device memory.

Shapes in comments: B batch, S new tokens, T tokens in the cache after the step, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.session import INPUTS, NeedLogits, checked_inputs, first_caches, require_kept
from cushion_deploy.engines.tensorrt.caches import Caches, GrowingCaches, Initial, InPlaceCaches, initial_content
from cushion_deploy.engines.tensorrt.cuda import Cuda, DeviceBuffer
from cushion_deploy.engines.tensorrt.cuda_graph import StepGraph
from cushion_deploy.engines.tensorrt.plan import Plan
from cushion_deploy.engines.tensorrt.profiles import WRITE_INDICES, Profile
from cushion_deploy.errors import CheckFailed, UsageError


class TensorRtSession:
    """A plan on an NVIDIA GPU (implements ``DecoderSession``).

    Device memory is allocated once, for the largest shapes of the profiles. A plan with a static cache updates it in
    place, and its decode steps are launched as one CUDA graph. With a growing cache a step reads one set of buffers and
    writes another, and every step has other shapes than the one before.

    Args:
        plan: bytes of a plan that is trusted, see :meth:`~cushion_deploy.engines.base.Engine.open`.
        contract: contract of the graph in the bundle; the plan may have another floating-point type.
        module: ``tensorrt_rtx`` or ``tensorrt``.
        prefix: what every cache begins with, if the contract says so.
        kv: scales of an INT8 cache, to quantize the prefix.

    Raises:
        MissingDependency: the library or the GPU is missing.
        CheckFailed: the library refuses the plan, or the GPU has too little memory.
        UntrustedArtifact: the plan was compiled from a graph with another contract.
    """

    def __init__(
        self,
        plan: bytes,
        contract: GraphContract,
        module: str,
        prefix: Prefix | None = None,
        kv: KvScales | None = None,
    ) -> None:
        """Deserialize the plan and allocate; the cache is empty."""
        self._buffers: list[DeviceBuffer] = []
        self._contexts: dict[int, Any] = {}
        self._length = 0
        self._rows: int | None = None
        self._plan: Plan | None = None
        self._graph: StepGraph | None = None
        self._cuda = Cuda()
        self._open = True
        self._free_before = self._cuda.free_bytes()
        try:
            self._plan = Plan(plan, contract, module)
            self.contract, self.profiles = self._plan.contract, self._plan.profiles
            first_caches(self.contract, prefix, 1, kv)
            scratch = self._new(self._plan.scratch_bytes)
            self._contexts = {p.index: self._plan.context(p, self._cuda, scratch) for p in self.profiles}
            if self.contract.cache_capacity:
                self._graph = StepGraph(self._cuda)
            self._caches = self._allocate(partial(initial_content, self.contract, prefix, kv))
        except BaseException:
            self.close()
            raise

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return self._length

    @property
    def device_bytes(self) -> int:
        """Device memory taken since the session was opened: weights, buffers, scratch, compiled kernels.

        Counted by the driver, so allocations of other processes on the device are included.
        """
        return self._free_before - self._cuda.free_bytes()

    def inspect(self) -> str:
        """Return the JSON of the engine inspector, see :mod:`cushion_deploy.engines.tensorrt.coverage.inspector`."""
        if self._plan is None:
            raise UsageError("the session is closed", hint="open the bundle again")
        return self._plan.inspect()

    def reset(self) -> None:
        """Empty the cache."""
        self._length, self._rows = 0, None

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the cache; raises UsageError if it holds fewer."""
        require_kept(length, self._length)
        if length == 0:
            self.reset()
        elif length < self._length and self._rows is not None:
            self._keep(self._rows, length)

    def run(
        self,
        ids: IntArray,
        mask: IntArray | None = None,
        positions: IntArray | None = None,
        *,
        need_logits: NeedLogits = "last",
    ) -> FloatArray | None:
        """Feed tokens after those in the cache, in chunks that the profiles admit; see ``DecoderSession.run``.

        A call that fails leaves the cache as it was.

        Raises:
            UsageError: shapes that do not match each other, the model, or any profile.
            CheckFailed: the device reports an error.
        """
        if not self._open:
            raise UsageError("the session is closed", hint="open the bundle again")
        mask, positions = checked_inputs(self.contract, self._length, self._rows, ids, mask, positions)
        before, (batch, new) = (self._length, self._rows), ids.shape
        start = mask.shape[1] - new
        step = max(profile.sequence for profile in self.profiles)
        chunks = [(begin, min(begin + step, new)) for begin in range(0, new, step)]
        # Every chunk is checked before the first one runs.
        used = [self._choose(batch, end - begin, start + begin) for begin, end in chunks]
        if self._rows is None:
            self._caches.seed(batch)
            self._cuda.synchronize()
        collected: list[FloatArray] = []
        try:
            for (begin, end), profile in zip(chunks, used, strict=True):
                rows = end - begin if need_logits == "all" else int(need_logits == "last" and end == new)
                logits = self._step(profile, ids[:, begin:end], mask[:, : start + end], positions[:, begin:end], rows)
                collected += [logits] if logits is not None else []
        except BaseException:
            self._undo(*before)
            raise
        return np.concatenate(collected, axis=1) if collected else None

    def close(self) -> None:
        """Free the device memory; the session cannot be used afterwards."""
        if not self._open:
            return
        self._open = False
        # Work that is still running would write to freed memory.
        with suppress(CheckFailed):
            self._cuda.synchronize()
        if self._graph is not None:
            self._graph.close()
        self._contexts.clear()
        if self._plan is not None:
            self._plan.close()
        for buffer in self._buffers:
            with suppress(CheckFailed):
                buffer.free()
        self._buffers.clear()
        with suppress(CheckFailed):
            self._cuda.close()

    def __enter__(self) -> TensorRtSession:
        """Return the session."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _allocate(self, initial: Initial) -> Caches:
        c = self.contract
        batch, total = (max(p.batch for p in self.profiles), max(p.total for p in self.profiles))
        sequence = max(p.sequence for p in self.profiles)
        lengths = {**dict(zip(INPUTS, (sequence, total, sequence), strict=True)), WRITE_INDICES: 1}
        self._inputs = {name: self._new(8 * batch * length) for name, length in lengths.items()}
        self._logits = self._new(4 * batch * sequence * c.vocab_size)
        if c.cache_capacity:
            return InPlaceCaches(self._cuda, self._new, c, initial, batch)
        return GrowingCaches(self._cuda, self._new, c, initial, batch, total)

    def _new(self, size: int) -> DeviceBuffer:
        self._buffers.append(self._cuda.allocate(size))
        return self._buffers[-1]

    def _choose(self, batch: int, sequence: int, past: int) -> Profile:
        """Return the profile with the fewest new tokens that admits a call."""
        for profile in self.profiles:
            if profile.admits(batch, sequence, past):
                return profile
        raise UsageError(
            f"a batch of {batch} with {sequence} new tokens after {past} fits no optimization profile: "
            + "; ".join(map(str, self.profiles)),
            hint="compile the engine with a larger --max-context or --max-batch; a plan is never rebuilt for a shape",
        )

    def _step(
        self, profile: Profile, ids: IntArray, mask: IntArray, positions: IntArray, rows: int
    ) -> FloatArray | None:
        """Feed one chunk; return the logits of its last ``rows`` tokens, ``[B, rows, vocab]``."""
        c, (batch, new) = self.contract, ids.shape
        given = self._given(ids, mask, positions)
        for name, array in given.items():
            self._cuda.upload(array, self._inputs[name])
        decoding, key = self._graph if new == 1 else None, (profile.index, batch)
        if decoding is None or not decoding.launch(key):
            context, enqueue = self._contexts[profile.index], partial(self._enqueue, profile)
            if decoding is None or not decoding.is_bound(key):
                # Not before a capture: after setting shapes, a step has to run without capture first.
                self._bind_all(context, given, batch, new, mask.shape[1] - new)
            if decoding is None:
                enqueue()
            else:
                decoding.run(key, context, enqueue)
        logits = np.empty((batch, rows, c.vocab_size), dtype=np.float32) if rows else None
        if logits is not None:
            line = 4 * c.vocab_size
            self._cuda.download_rows(self._logits, (new - rows) * line, new * line, logits)
        self._cuda.synchronize()
        self._caches.advance()
        self._length, self._rows = self._length + new, batch
        return logits

    def _enqueue(self, profile: Profile) -> None:
        if not self._contexts[profile.index].execute_async_v3(self._cuda.stream):
            raise CheckFailed(
                f"the plan refuses to run in profile '{profile.name}'", hint="see the log lines of TensorRT above"
            )

    def _given(self, ids: IntArray, mask: IntArray, positions: IntArray) -> dict[str, IntArray]:
        """Return the inputs of a call by name; a static cache takes a mask of its capacity, and the slots to write."""
        given = dict(zip(INPUTS, (ids, mask, positions), strict=True))
        if capacity := self.contract.cache_capacity:
            given["attention_mask"] = np.zeros((len(ids), capacity), dtype=np.int64)
            given["attention_mask"][:, : mask.shape[1]] = mask
            given[WRITE_INDICES] = np.full(len(ids), mask.shape[1] - ids.shape[1], dtype=np.int64)
        return given

    def _bind_all(self, context: Any, given: Mapping[str, IntArray], batch: int, new: int, past: int) -> None:
        """Bind every input and output of a call, and check that the plan accepts and returns these shapes."""
        for name, array in given.items():
            self._bind_input(context, name, array.shape, self._inputs[name].at(array.nbytes))
        for cache in self._caches.bindings(batch, past, new):
            self._bind_input(context, cache.past, cache.shape, cache.read)
            self._bind(context, cache.present, cache.written)
        wanted = (batch, new, self.contract.vocab_size)
        self._bind(context, "logits", self._logits.at(4 * batch * new * self.contract.vocab_size))
        try:
            missing = context.infer_shapes()
        except RuntimeError as e:
            raise CheckFailed(f"the plan refuses these shapes: {e}", hint="build the bundle again") from e
        if missing:
            raise CheckFailed(f"the plan is missing the shapes of {', '.join(missing)}", hint="build the bundle again")
        shape = tuple(context.get_tensor_shape("logits"))
        if shape != wanted:
            raise CheckFailed(
                f"the plan returns logits of shape {list(shape)}, expected {list(wanted)}",
                hint="build the bundle again",
            )

    def _bind_input(self, context: Any, name: str, shape: Sequence[int], address: int) -> None:
        if not context.set_input_shape(name, tuple(shape)):
            raise CheckFailed(f"the plan refuses {name} {list(shape)}", hint="build the bundle again")
        self._bind(context, name, address)

    def _bind(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise CheckFailed(f"the plan has no tensor {name}", hint="build the bundle again")

    def _keep(self, rows: int, length: int) -> None:
        """Continue with the first ``length`` tokens of every row."""
        self._caches.keep(rows, self._length, length)
        self._cuda.synchronize()
        self._length = length

    def _undo(self, length: int, rows: int | None) -> None:
        """Restore the cache to what it was before a failed call."""
        # After an error in a kernel nothing can be copied: the session is unusable, and its next call raises.
        with suppress(CheckFailed):
            if rows is None:
                self.reset()
            else:
                self._keep(rows, length)
