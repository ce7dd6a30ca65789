"""ONNX Runtime on the CPU as a decoder session.

Shapes in comments: B batch, S new tokens, T tokens in the cache after the step, K key/value heads, D head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.session import (
    INPUTS,
    NeedLogits,
    cached_prefix,
    cached_scales,
    checked_inputs,
    first_caches,
    past_names,
    require_kept,
)
from cushion_deploy.engines.onnxruntime.compile import SESSION_CONFIG
from cushion_deploy.errors import MissingDependency, UntrustedArtifact, UsageError

CPU = "CPUExecutionProvider"
PROVIDERS = {
    "onnxruntime": CPU,
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
"""Engines of ONNX Runtime and the provider of each. Providers of a GPU leave nodes to the CPU that they do not have."""
TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int8": "tensor(int8)",
}
_GPU = "pip uninstall onnxruntime, then pip install 'cushion-deploy[gpu]'"
_INSTALL = {
    CPU: "pip install 'cushion-deploy[cpu]'",
    PROVIDERS["onnxruntime-cuda"]: _GPU,
    PROVIDERS["onnxruntime-tensorrt"]: _GPU,
    PROVIDERS["onnxruntime-tensorrt-rtx"]: "install a build with this provider, such as onnxruntime-trt-rtx",
}
LOGITS_START = "logits_start"
"""Initializer of a graph, int64 ``[1]``, that a caller may override: the head sees tokens from this one on."""


def session_options(*, threads: int | None = None, fused: bool = True) -> Any:
    """Return onnxruntime SessionOptions for a decoder graph on the CPU, the same for everything that runs one.

    Args:
        threads: threads for one operator; None for one per physical core.
        fused: False runs the graph as it is written.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    ort = _import_onnxruntime()
    options = ort.SessionOptions()
    # Warnings off: it warns of every initializer that a caller may override, which logits_start is on purpose.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    # Flush-to-zero reaches a session's own worker threads every time, but the thread that calls it only through the
    # first session that the process creates: ONNX Runtime looks once. So every session has to carry the setting.
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def open_session(graph: ExportedGraph, **options: Any) -> OnnxRuntimeSession:
    """Return a session of a graph; what its cache begins with is read from beside it.

    Args:
        graph: of a verified bundle, or just written.
        options: of :class:`OnnxRuntimeSession`.

    Raises:
        UsageError, UntrustedArtifact, MissingDependency: see there, and ``read_cached_prefix``, ``read_cached_scales``.
    """
    prefix, kv = cached_prefix(graph), cached_scales(graph)
    return OnnxRuntimeSession(graph.path, graph.contract, prefix=prefix, kv=kv, **options)


class OnnxRuntimeSession:
    """A decoder graph in ONNX Runtime on the CPU (implements ``DecoderSession``).

    Keys and values stay in the runtime's own memory between steps; only token ids and logits cross to numpy.

    Args:
        model_path: the ``.onnx`` file, its external data beside it.
        contract: what the graph says of itself; compared with the file.
        threads: threads for one operator; None for one per physical core.
        fused: False runs the graph as it is written, Q and DQ as nodes of their own: the slow reference.
        chunk: longest piece of a prompt that one call feeds; pieces skip most of what the causal mask would discard.
            The last piece is fed whole: its last token alone would be one more step (0 to 10 % slower, measured).
        prefix: what every cache begins with, where the contract says so.
        kv: scales of an INT8 cache, for its prefix.
        provider: execution provider. On a GPU the cache crosses to it at every step: correct, and not fast.

    Raises:
        MissingDependency: onnxruntime is not installed, or does not run the graph on the provider.
        UsageError: no such file, or an impossible option.
        UntrustedArtifact: the file is no graph, or not the one that the contract describes.
    """

    def __init__(
        self,
        model_path: Path,
        contract: GraphContract,
        *,
        threads: int | None = None,
        fused: bool = True,
        chunk: int = 128,
        prefix: Prefix | None = None,
        kv: KvScales | None = None,
        provider: str = CPU,
    ) -> None:
        """Load the graph; the cache is empty."""
        if chunk < 1:
            raise UsageError(f"chunk is {chunk}", hint="feed prompts in pieces of at least one token, 128 by default")
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}", hint="give at least 1, or leave it out for one per core")
        if not model_path.is_file():
            raise UsageError(f"{model_path} does not exist", hint="give the .onnx file of a bundle")
        self._ort = _import_onnxruntime()
        self.contract = contract
        self.chunk = chunk
        self._session = self._open(model_path, threads, fused, provider)
        self._prefix, self._kv = prefix, kv
        first_caches(contract, prefix, 1, kv)
        self._past_names = past_names(contract)
        self._present_names = [f"present.{i}.{part}" for i in range(contract.num_layers) for part in ("key", "value")]
        self._check_contract(model_path)
        # The head is a fifth of the work of a small model. ONNX Runtime computes it even when nobody fetches its output
        # (RunOptions.only_execute_path_to_fetches does nothing outside of training builds: measured, 1.31), so the
        # graph itself has to offer a way around it.
        self._can_skip_head = LOGITS_START in {i.name for i in self._session.get_overridable_initializers()}
        self._cache: list[Any] = []
        self._length = 0

    def _open(self, model_path: Path, threads: int | None, fused: bool, provider: str) -> Any:
        options = session_options(threads=threads, fused=fused)
        available = self._ort.get_available_providers()
        if provider not in available:
            raise MissingDependency(
                f"this ONNX Runtime has no {provider}; it has {', '.join(available)}", hint=_INSTALL[provider]
            )
        wanted = [CPU] if provider == CPU else [provider, CPU]
        try:
            session = self._ort.InferenceSession(model_path, options, providers=wanted)
        except Exception as e:  # its errors share no base class but Exception
            raise UntrustedArtifact(
                f"ONNX Runtime cannot load {model_path}: {str(e).splitlines()[0]:.300}",
                hint="run `cushion-deploy verify` on the bundle; if it is intact, build it again",
            ) from e
        # It falls back to the CPU without a word where a driver or a library of the provider is missing.
        if session.get_providers() != wanted:
            raise MissingDependency(
                f"ONNX Runtime runs the graph on {', '.join(session.get_providers())}, asked for {provider}",
                hint="see what `nvidia-smi` says, and which CUDA this onnxruntime wants; or run --engine onnxruntime",
            )
        return session

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
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return self._length

    def reset(self) -> None:
        """Empty the cache."""
        self._cache, self._length = [], 0

    def close(self) -> None:
        """Empty the cache; everything else goes with the object."""
        self.reset()

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the cache: one copy of what is kept.

        Raises:
            UsageError: the cache holds fewer.
        """
        require_kept(length, self._length)
        if length == 0:
            self.reset()
        elif length < self._length:
            kept = self.contract.prefix_slots + length
            self._cache = [self._value(np.ascontiguousarray(v.numpy()[:, :, :kept])) for v in self._cache]
            self._length = length

    def run(
        self,
        ids: IntArray,
        mask: IntArray | None = None,
        positions: IntArray | None = None,
        *,
        need_logits: NeedLogits = "last",
    ) -> FloatArray | None:
        """Feed tokens after those in the cache, in pieces of at most ``chunk``; see ``DecoderSession.run``.

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
        """Feed one piece; return the logits of its last ``rows`` tokens, ``[B, rows, vocab]``."""
        feed = dict(zip(self._past_names, self._cache, strict=True))
        feed.update(
            {n: self._value(np.ascontiguousarray(a)) for n, a in zip(INPUTS, (ids, mask, positions), strict=True)}
        )
        if self._can_skip_head:
            feed[LOGITS_START] = self._value(np.array([ids.shape[1] - rows], dtype=np.int64))
        names = ["logits", *self._present_names] if rows else self._present_names
        outputs = self._session.run_with_ort_values(names, feed)
        self._cache = outputs[-len(self._present_names) :]
        self._length += ids.shape[1]
        return outputs[0].numpy()[:, -rows:] if rows else None

    def _empty(self, batch: int) -> list[Any]:
        return [self._value(array) for array in first_caches(self.contract, self._prefix, batch, self._kv)]

    def _value(self, array: Any) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(array)


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as e:
        raise MissingDependency("onnxruntime is not installed", hint="pip install 'cushion-deploy[cpu]'") from e
    return onnxruntime
