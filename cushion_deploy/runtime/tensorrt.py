"""TensorRT and TensorRT-RTX as a decoder session: one plan, its optimization profiles, caches in device memory.

Shapes in comments: B batch, S new tokens, T tokens in the cache after the step, K key/value heads, D head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from cushion_deploy.errors import CheckFailed, MissingDependency, UntrustedArtifact, UsageError
from cushion_deploy.kv_scales import KvScales
from cushion_deploy.runtime.cuda import Cuda, DeviceBuffer
from cushion_deploy.runtime.profiles import CACHE, Profile, read_profiles
from cushion_deploy.runtime.session import (
    INPUTS,
    NUMPY_TYPES,
    NeedLogits,
    checked_inputs,
    first_caches,
    past_names,
    require_kept,
)
from cushion_deploy.types import Dtype, FloatArray, GraphContract, IntArray, Prefix

REBUILD = "compile the engine again here: `cushion-deploy build ... --engine {engine}`"
_TYPES: dict[str, Dtype] = {"HALF": "float16", "FLOAT": "float32"}


class TensorRtSession:
    """A plan on an NVIDIA GPU (implements ``DecoderSession``).

    Device memory is allocated once, for the largest shapes of the profiles. Keys and values lie in two sets of
    buffers: a step reads one and writes the other. A CUDA graph would have to be captured anew at each step, because
    the cache grows; none is used.

    Args:
        plan: bytes of a plan whose digest stood in a verified manifest; deserializing runs code.
        contract: of the graph that the bundle holds; the plan may have another floating-point type.
        module: ``tensorrt_rtx`` or ``tensorrt``.
        prefix: what every cache begins with, where the contract says so.
        kv: scales of an INT8 cache, for its prefix.

    Raises:
        MissingDependency: the library or a device is not there.
        CheckFailed: the library refuses the plan, or the device has too little memory.
        UntrustedArtifact: the plan is not of a graph with this contract.
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
        self._prefix, self._kv, self._length = prefix, kv, 0
        self._rows: int | None = None
        self._past = past_names(contract)
        self._present = [name.replace("past_key_values", "present") for name in self._past]
        self._trt = _import(module)
        self._cuda = Cuda()
        self._open = True
        try:
            self._logger = self._trt.Logger(self._trt.Logger.WARNING)
            self._runtime = self._trt.Runtime(self._logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise CheckFailed(
                    f"{module} {self._trt.__version__} refuses the plan: made by another version or for another GPU",
                    hint=REBUILD.format(engine=module.replace("_", "-")),
                )
            dtype = self._check_contract(contract)
            self.profiles = read_profiles(self._engine)
            # A plan may hold fewer tokens than the model has positions for: whoever asks for the limit hears that one.
            room = max(profile.past[1] for profile in self.profiles) + 1 - contract.prefix_slots
            positions = min(contract.max_positions, room + contract.prefix_length)
            self.contract = replace(contract, dtype=dtype, max_positions=positions)
            first_caches(self.contract, prefix, 1, kv)
            self._contexts = {profile.index: self._context(profile) for profile in self.profiles}
            self._allocate()
        except BaseException:
            self.close()
            raise

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return self._length

    def reset(self) -> None:
        """Empty the cache."""
        self._length, self._rows = 0, None

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the cache; raises UsageError when it holds fewer."""
        require_kept(length, self._length)
        if length == 0:
            self.reset()
        elif length < self._length and self._rows is not None:
            self._keep(length)

    def run(
        self,
        ids: IntArray,
        mask: IntArray | None = None,
        positions: IntArray | None = None,
        *,
        need_logits: NeedLogits = "last",
    ) -> FloatArray | None:
        """Feed tokens after those in the cache, in pieces that the profiles admit; see ``DecoderSession.run``.

        A call that fails leaves the cache as it was.

        Raises:
            UsageError: shapes that do not fit each other, the model, or any profile; the message names them.
            CheckFailed: the device reports an error.
        """
        if not self._open:
            raise UsageError("the session is closed", hint="open the bundle again")
        mask, positions = checked_inputs(self.contract, self._length, self._rows, ids, mask, positions)
        before, (batch, new) = (self._length, self._rows), ids.shape
        start = mask.shape[1] - new
        step = max(profile.sequence for profile in self.profiles)
        pieces = [(begin, min(begin + step, new)) for begin in range(0, new, step)]
        # Refused before anything runs.
        used = [self._choose(batch, end - begin, start + begin) for begin, end in pieces]
        if self._rows is None:
            self._seed(batch)
        collected: list[FloatArray] = []
        try:
            for (begin, end), profile in zip(pieces, used, strict=True):
                rows = end - begin if need_logits == "all" else int(need_logits == "last" and end == new)
                logits = self._step(profile, ids[:, begin:end], mask[:, : start + end], positions[:, begin:end], rows)
                collected += [logits] if logits is not None else []
        except BaseException:
            self._undo(*before)
            raise
        return np.concatenate(collected, axis=1) if collected else None

    def close(self) -> None:
        """Give the device memory back; the session cannot be used afterwards."""
        if not self._open:
            return
        self._open = False
        # A context that still ran would write into memory that is gone.
        with suppress(CheckFailed):
            self._cuda.synchronize()
        self._contexts.clear()
        self._engine = self._runtime = None
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

    def _check_contract(self, contract: GraphContract) -> Dtype:
        """Return the plan's floating-point type; raises UntrustedArtifact for the plan of another graph.

        An INT8 cache says nothing of it: the contract's own is returned then.
        """
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        expected = {*INPUTS, *self._past, *self._present, "logits"}
        found = tuple(engine.get_tensor_shape(CACHE)) if CACHE in names else ()
        wanted = (contract.num_kv_heads, contract.head_dim)
        if set(names) != expected or (found[1], found[3]) != wanted:
            differing = sorted(set(names) ^ expected)
            raise UntrustedArtifact(
                f"the plan is not of this bundle's graph: {differing[0] if differing else CACHE} does not fit",
                hint="build the bundle again",
            )
        kind = engine.get_tensor_dtype(CACHE).name
        if (kind not in _TYPES and kind != "INT8") or contract.quantized_cache != (kind == "INT8"):
            raise UntrustedArtifact(f"the plan keeps its cache as {kind}", hint="build the bundle again")
        return _TYPES.get(kind, contract.dtype)

    def _context(self, profile: Profile) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile.index, self._cuda.stream):
            raise CheckFailed(
                f"no execution context for the profile '{profile.name}'",
                hint="free device memory, or compile the engine with a smaller --max-context",
            )
        self._cuda.synchronize()
        return context

    def _allocate(self) -> None:
        c = self.contract
        batch, total = (max(p.batch for p in self.profiles), max(p.total for p in self.profiles))
        sequence = max(p.sequence for p in self.profiles)
        self._cache_type = np.dtype(NUMPY_TYPES[c.cache_dtype])
        cache = batch * c.num_kv_heads * total * c.head_dim * self._cache_type.itemsize
        lengths = zip(INPUTS, (sequence, total, sequence), strict=True)
        self._inputs = {name: self._new(8 * batch * length) for name, length in lengths}
        self._logits = self._new(4 * batch * sequence * c.vocab_size)
        self._caches = [[self._new(cache) for _ in self._past] for _ in range(2)]

    def _new(self, size: int) -> DeviceBuffer:
        self._buffers.append(self._cuda.allocate(size))
        return self._buffers[-1]

    def _choose(self, batch: int, sequence: int, past: int) -> Profile:
        """Return the profile for a call, the narrowest first."""
        for profile in self.profiles:
            if profile.admits(batch, sequence, past):
                return profile
        raise UsageError(
            f"a batch of {batch} with {sequence} new tokens after {past} fits no optimization profile: "
            + "; ".join(map(str, self.profiles)),
            hint="compile the engine with a larger --max-context or --max-batch; a plan is never rebuilt for a shape",
        )

    def _seed(self, batch: int) -> None:
        """Begin the caches of a new batch: with the prefix, where it is not in the graph."""
        first = first_caches(self.contract, self._prefix, batch, self._kv)
        for buffer, array in zip(self._caches[0], first, strict=True):
            self._cuda.upload(array, buffer)
        self._cuda.synchronize()

    def _step(
        self, profile: Profile, ids: IntArray, mask: IntArray, positions: IntArray, rows: int
    ) -> FloatArray | None:
        """Feed one piece; return the logits of its last ``rows`` tokens, ``[B, rows, vocab]``."""
        c, context, (batch, new) = self.contract, self._contexts[profile.index], ids.shape
        past = mask.shape[1] - new
        cache_shape = (batch, c.num_kv_heads, past, c.head_dim)
        for name, array in zip(INPUTS, (ids, mask, positions), strict=True):
            self._cuda.upload(array, self._inputs[name])
            self._bind_input(context, name, array.shape, self._inputs[name].at(array.nbytes))
        size = batch * c.num_kv_heads * c.head_dim * self._cache_type.itemsize
        for i, (source, target) in enumerate(zip(*self._caches, strict=True)):
            self._bind_input(context, self._past[i], cache_shape, source.at(past * size))
            self._bind(context, self._present[i], target.at((past + new) * size))
        self._bind(context, "logits", self._logits.at(4 * batch * new * c.vocab_size))
        try:
            missing = context.infer_shapes()
        except RuntimeError as e:
            raise CheckFailed(f"the plan refuses these shapes: {e}", hint="build the bundle again") from e
        if missing:
            raise CheckFailed(f"shapes that the plan misses: {', '.join(missing)}", hint="build the bundle again")
        shape = tuple(context.get_tensor_shape("logits"))
        if shape != (batch, new, c.vocab_size):
            raise CheckFailed(f"the plan gives logits {list(shape)}", hint="build the bundle again")
        if not context.execute_async_v3(self._cuda.stream):
            raise CheckFailed(
                f"the plan refuses to run in profile '{profile.name}'", hint="see the log lines of TensorRT above"
            )
        logits = np.empty((batch, rows, c.vocab_size), dtype=np.float32) if rows else None
        if logits is not None:
            line = 4 * c.vocab_size
            self._cuda.download_rows(self._logits, (new - rows) * line, new * line, logits)
        self._cuda.synchronize()
        self._caches.reverse()
        self._length, self._rows = self._length + new, batch
        return logits

    def _bind_input(self, context: Any, name: str, shape: Sequence[int], address: int) -> None:
        if not context.set_input_shape(name, tuple(shape)):
            raise CheckFailed(f"the plan refuses {name} {list(shape)}", hint="build the bundle again")
        self._bind(context, name, address)

    def _bind(self, context: Any, name: str, address: int) -> None:
        if not context.set_tensor_address(name, address):
            raise CheckFailed(f"the plan has no {name}", hint="build the bundle again")

    def _keep(self, length: int) -> None:
        """Copy the first ``length`` tokens of every head into the other set of caches, and go on with that."""
        c, rows = self.contract, (self._rows or 0) * self.contract.num_kv_heads
        token = c.head_dim * self._cache_type.itemsize
        pitch, width = ((c.prefix_slots + n) * token for n in (self._length, length))
        for source, target in zip(*self._caches, strict=True):
            self._cuda.copy_rows(source, pitch, target, width, rows)
        self._cuda.synchronize()
        self._caches.reverse()
        self._length = length

    def _undo(self, length: int, rows: int | None) -> None:
        """Go back to the cache before a call that failed: a later cache begins with it."""
        # After an error of a kernel nothing can be copied any more: the session is lost, and its next call says so.
        with suppress(CheckFailed):
            if rows is None:
                self.reset()
            elif self._length > length:
                self._keep(length)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise MissingDependency(
            f"{module} is not installed",
            hint=f"pip install 'cushion-deploy[{'rtx' if module == 'tensorrt_rtx' else 'tensorrt'}]'",
        ) from e
