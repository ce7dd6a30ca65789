"""ONNX Runtime as a decoder session.

Shapes in comments: B batch, S new tokens, T tokens in the cache after the step, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.session import (
    INPUTS,
    HeldCache,
    NeedLogits,
    RowSlice,
    cached_prefix,
    cached_scales,
    checked_inputs,
    first_caches,
    held_bytes,
    past_names,
    require_kept,
)
from cushion_deploy.engines.onnxruntime.device_cache import DeviceCache
from cushion_deploy.engines.onnxruntime.load import load_graph
from cushion_deploy.engines.onnxruntime.settings import (
    CHUNK,
    CPU,
    DEFAULTS,
    Provider,
    SessionSettings,
    import_onnxruntime,
)
from cushion_deploy.errors import UntrustedArtifact, UsageError

TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}
"""ONNX Runtime's name of the types that a cache can have here: not bfloat16, which numpy lacks."""
LOGITS_START = "logits_start"
"""Initializer of a graph, int64 ``[1]``, that a caller may override: the head is computed from this token on."""


def open_session(
    graph: ExportedGraph,
    *,
    threads: int | None = None,
    fused: bool = True,
    chunk: int = CHUNK,
    provider: Provider = CPU,
    prepack: bool = True,
) -> OnnxRuntimeSession:
    """Open a session of a graph, with the prefix and scales of its cache read from beside it.

    Args:
        graph: graph of a verified bundle, or one just written.
        threads, fused, chunk, provider, prepack: see
            :class:`~cushion_deploy.engines.onnxruntime.settings.SessionSettings`.

    Raises:
        UsageError, UntrustedArtifact, MissingDependency: see :class:`OnnxRuntimeSession`, ``read_cached_prefix`` and
            ``read_cached_scales``.
    """
    settings = SessionSettings(threads, fused, chunk, provider, prepack)
    prefix, kv = cached_prefix(graph), cached_scales(graph)
    return OnnxRuntimeSession(graph.path, graph.contract, settings, prefix=prefix, kv=kv)


class OnnxRuntimeSession:
    """A decoder graph in ONNX Runtime (implements ``BatchSession``).

    Keys and values stay in memory of ONNX Runtime between steps, on the device of the provider; only token ids and
    logits cross to numpy.

    Args:
        model_path: the ``.onnx`` file, its external data beside it.
        contract: inputs and outputs of the graph; compared with the file.
        settings: threads, fusion, chunk and provider.
        prefix: what every cache begins with, if the contract says so.
        kv: scales of an INT8 cache, to quantize the prefix.

    Raises:
        MissingDependency: onnxruntime is not installed, or does not run the graph on the provider.
        CheckFailed: the provider leaves matrix products to the CPU.
        UsageError: the file does not exist, its cache is bfloat16, or the prefix or its scales are missing.
        UntrustedArtifact: the file is not a graph, or not the one that the contract describes.
    """

    def __init__(
        self,
        model_path: Path,
        contract: GraphContract,
        settings: SessionSettings = DEFAULTS,
        *,
        prefix: Prefix | None = None,
        kv: KvScales | None = None,
    ) -> None:
        """Load the graph; the cache is empty."""
        if not model_path.is_file():
            raise UsageError(f"{model_path} does not exist", hint="give the .onnx file of a bundle")
        if contract.cache_dtype not in TYPES:
            raise UsageError(
                f"{model_path} has a cache of {contract.cache_dtype}, which ONNX Runtime cannot exchange with numpy",
                hint="run a float32 or float16 graph here; bfloat16 is for TensorRT plans (--plan-dtype bf16)",
            )
        self.contract = contract
        self.chunk = settings.chunk
        self._ort = import_onnxruntime()
        self._session, self.placement = load_graph(model_path, settings)
        self._prefix, self._kv = prefix, kv
        first_caches(contract, prefix, 1, kv)
        self._past_names = past_names(contract)
        self._present_names = [f"present.{i}.{part}" for i in range(contract.num_layers) for part in ("key", "value")]
        self._check_contract(model_path)
        self._multiplies_floats = settings.provider.multiplies_floats
        self._device: DeviceCache | None = None
        if settings.provider.device:
            self._device = DeviceCache(self._session, settings.provider, TYPES[contract.cache_dtype])
        # The head is a fifth of the work of a small model. ONNX Runtime computes it even if nobody fetches its output
        # (RunOptions.only_execute_path_to_fetches has no effect outside of training builds: measured, 1.31), so the
        # graph itself has to offer a way around it.
        self._can_skip_head = LOGITS_START in {i.name for i in self._session.get_overridable_initializers()}
        self._cache: list[Any] = []
        self._length = 0

    def _check_contract(self, model_path: Path) -> None:
        c = self.contract
        past = ["batch", c.num_kv_heads, "past", c.head_dim]
        cache_type = TYPES[c.cache_dtype]
        found = {i.name: (i.type, i.shape) for i in self._session.get_inputs()}
        expected = {name: (cache_type, past) for name in self._past_names}
        expected["input_ids"] = expected["position_ids"] = ("tensor(int64)", ["batch", "sequence"])
        expected["attention_mask"] = ("tensor(int64)", ["batch", "total"])
        differing = [name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name)]
        outputs = {o.name: o.shape[-1] for o in self._session.get_outputs()}
        if outputs != {"logits": c.vocab_size, **dict.fromkeys(self._present_names, c.head_dim)}:
            differing.append("the outputs")
        if differing:
            name = differing[0]
            raise UntrustedArtifact(
                f"{model_path} is not the graph that its contract describes: {name} is {found.get(name)}, "
                f"expected {expected.get(name)}",
                hint="build the bundle again",
            )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a GPU provider multiplies where that is not INT8, and where nodes run; empty on the CPU provider."""
        said = [f"multiplies {self.contract.dtype} values of the INT8 codes"] if self._multiplies_floats else []
        return (*said, self.placement.words) if self.placement else tuple(said)

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return self._length

    def reset(self) -> None:
        """Empty the cache."""
        self._cache, self._length = [], 0

    def close(self) -> None:
        """Empty the cache; the garbage collector frees everything else."""
        self.reset()

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the cache, by one copy of them.

        Raises:
            UsageError: the cache holds fewer.
        """
        require_kept(length, self._length)
        if length == 0:
            self.reset()
        elif length < self._length:
            kept = self.contract.prefix_slots + length
            if self._device:
                self._cache = self._device.first(self._cache, kept)
            else:
                self._cache = [self._value(np.ascontiguousarray(v.numpy()[:, :, :kept])) for v in self._cache]
            self._length = length

    def hold(self) -> HeldCache:
        """Take the cache out; a step writes new values, so what was taken out is never altered."""
        values, length = tuple(self._cache), self._length
        self.reset()
        if not length:
            return HeldCache()
        rows = values[0].shape()[0]
        return HeldCache(values, rows, length, held_bytes(self.contract, rows, length))

    def restore(self, cache: HeldCache) -> None:
        """Continue with a cache that :meth:`hold` or :meth:`gather` returned."""
        self._cache, self._length = list(cache.values), cache.length

    def gather(self, slices: Sequence[RowSlice]) -> HeldCache:
        """Copy rows into one cache, padded on the left with zeros; see ``BatchSession.gather``."""
        if not slices or min(s.length for s in slices) < 1:
            raise UsageError("a row without a token cannot be batched", hint="feed its prompt before gathering it")
        c, longest = self.contract, max(s.length for s in slices)
        gather = self._device.gather if self._device else self._gather
        values = gather(slices, c.prefix_slots)
        return HeldCache(tuple(values), len(slices), longest, held_bytes(c, len(slices), longest))

    def _gather(self, slices: Sequence[RowSlice], slots: int) -> list[Any]:
        """Return the values of :meth:`gather`, copied in the memory of the host."""
        c, longest = self.contract, max(s.length for s in slices)
        values = []
        for i in range(len(self._past_names)):
            arrays = [s.cache.values[i].numpy() for s in slices]
            shape = (len(slices), c.num_kv_heads, slots + longest, c.head_dim)
            joined = np.zeros(shape, dtype=arrays[0].dtype)
            for row, s, array in zip(joined, slices, arrays, strict=True):
                row[:, :slots] = array[s.row, :, :slots]
                row[:, slots + longest - s.length :] = array[s.row, :, slots + s.begin : slots + s.end]
            values.append(self._value(joined))
        return values

    def run(
        self,
        ids: IntArray,
        mask: IntArray | None = None,
        positions: IntArray | None = None,
        *,
        need_logits: NeedLogits = "last",
    ) -> FloatArray | None:
        """Feed tokens after those in the cache, in chunks of at most ``chunk``; see ``DecoderSession.run``.

        A call that fails leaves the cache as it was.
        """
        rows = self._cache[0].shape()[0] if self._cache else None
        mask, positions = checked_inputs(self.contract, self._length, rows, ids, mask, positions)
        before = self._cache, self._length
        if not before[0]:
            self._cache = self._empty(ids.shape[0])
        collected: list[FloatArray] = []
        new = ids.shape[1]
        start = mask.shape[1] - new
        try:
            for begin in range(0, new, self.chunk):
                end = min(begin + self.chunk, new)
                rows = end - begin if need_logits == "all" else int(need_logits == "last" and end == new)
                logits = self._step(ids[:, begin:end], mask[:, : start + end], positions[:, begin:end], rows)
                if logits is not None:
                    collected.append(logits)
        except BaseException:
            self._cache, self._length = before
            raise
        if need_logits == "none":
            return None
        return collected[0] if len(collected) == 1 else np.concatenate(collected, axis=1)

    def _step(self, ids: IntArray, mask: IntArray, positions: IntArray, rows: int) -> FloatArray | None:
        """Feed one chunk; return the logits of its last ``rows`` tokens, ``[B, rows, vocab]``."""
        feed = dict(zip(self._past_names, self._cache, strict=True))
        feed.update(
            {n: self._value(np.ascontiguousarray(a)) for n, a in zip(INPUTS, (ids, mask, positions), strict=True)}
        )
        if self._can_skip_head:
            feed[LOGITS_START] = self._value(np.array([ids.shape[1] - rows], dtype=np.int64))
        names = ["logits", *self._present_names] if rows else self._present_names
        run = self._device.step if self._device else self._session.run_with_ort_values
        outputs = run(names, feed)
        self._cache = outputs[-len(self._present_names) :]
        self._length += ids.shape[1]
        return outputs[0].numpy()[:, -rows:] if rows else None

    def _empty(self, batch: int) -> list[Any]:
        return [self._value(array) for array in first_caches(self.contract, self._prefix, batch, self._kv)]

    def _value(self, array: Any) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array)
