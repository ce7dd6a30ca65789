"""A decoder session in OpenVINO. Keys and values are states of the compiled model: only logits leave it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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
    require_kept,
)
from cushion_deploy.engines.openvino.kernels import require_exact
from cushion_deploy.engines.openvino.library import import_openvino, reason
from cushion_deploy.engines.openvino.model import LOGITS_START, compile_graph, import_blob, name_of, state_names
from cushion_deploy.errors import CheckFailed, UntrustedArtifact

CHUNK = 256
"""Most prompt tokens in one call by default."""


def open_session(
    graph: ExportedGraph, blob: bytes = b"", *, threads: int | None = None, chunk: int = CHUNK
) -> OpenVinoSession:
    """Open a session of a graph, with the prefix and scales of its cache read from beside it.

    Args:
        graph: graph of a verified bundle, or one just written.
        blob: the compiled model, verified; empty to compile the graph.
        threads: None for one per physical core.
        chunk: most prompt tokens in one call. A prompt fed in chunks skips most of what the causal mask would discard.

    Raises:
        MissingDependency: OpenVINO is not installed, or the processor adds products of INT8 codes with saturation.
        UsageError, UntrustedArtifact: see ``compile_graph``, ``import_blob`` and :class:`OpenVinoSession`.
    """
    if graph.quantized:
        require_exact()
    prefix, kv = cached_prefix(graph), cached_scales(graph)
    compiled = import_blob(blob, threads) if blob else compile_graph(graph, threads)
    return OpenVinoSession(compiled, graph.contract, chunk=chunk, prefix=prefix, kv=kv)


class OpenVinoSession:
    """A compiled decoder in OpenVINO (implements ``DecoderSession``).

    Args:
        compiled: an ``openvino.CompiledModel``.
        contract: inputs and outputs of the graph; compared with the inputs, outputs and states of the model.
        chunk: most prompt tokens in one call.
        prefix: what every cache begins with, if the contract says so.
        kv: scales of an INT8 cache, to quantize the prefix.

    Raises:
        UsageError: the prefix or its scales are missing.
        UntrustedArtifact: the model is not the one that the contract describes.
    """

    def __init__(
        self,
        compiled: Any,
        contract: GraphContract,
        *,
        chunk: int = CHUNK,
        prefix: Prefix | None = None,
        kv: KvScales | None = None,
    ) -> None:
        """Create the request that holds the states; the cache is empty."""
        self.contract = contract
        self.chunk = chunk
        self._prefix, self._kv = prefix, kv
        first_caches(contract, prefix, 1, kv)
        self._tensor = import_openvino().Tensor
        inputs = {name_of(port) for port in compiled.inputs}
        self._can_skip_head = LOGITS_START in inputs
        self._request = compiled.create_infer_request()
        self._states = _states_in_order(self._request, contract)
        vocabulary = {name_of(port): port.get_partial_shape()[-1].get_length() for port in compiled.outputs}
        if inputs - {LOGITS_START} != {*INPUTS} or vocabulary != {"logits": contract.vocab_size}:
            raise UntrustedArtifact(
                f"the compiled model is not that of the graph: its inputs are {', '.join(sorted(inputs))}, "
                f"its outputs {vocabulary}",
                hint="build the bundle again",
            )
        self._length, self._rows = 0, 0

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        return self._length

    def reset(self) -> None:
        """Empty the cache."""
        for state in self._states:
            state.reset()
        self._length, self._rows = 0, 0

    def close(self) -> None:
        """Empty the cache; the garbage collector frees everything else."""
        self.reset()

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the cache, by one copy of them.

        Raises:
            UsageError: the cache holds fewer.
        """
        require_kept(length, self._length)
        if length < self._length:
            self._keep(length)

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
        mask, positions = checked_inputs(self.contract, self._length, self._rows or None, ids, mask, positions)
        before = self._length
        if not self._rows:
            self._write(first_caches(self.contract, self._prefix, ids.shape[0], self._kv))
            self._rows = ids.shape[0]
        collected: list[FloatArray] = []
        new = ids.shape[1]
        start = mask.shape[1] - new
        try:
            for begin in range(0, new, self.chunk):
                end = min(begin + self.chunk, new)
                rows = end - begin if need_logits == "all" else int(need_logits == "last" and end == new)
                logits = self._step(ids[:, begin:end], mask[:, : start + end], positions[:, begin:end], rows)
                if rows:
                    collected.append(logits)
        except BaseException:
            self._keep(before)
            raise
        if need_logits == "none":
            return None
        return collected[0] if len(collected) == 1 else np.concatenate(collected, axis=1)

    def _step(self, ids: IntArray, mask: IntArray, positions: IntArray, rows: int) -> FloatArray:
        """Feed one chunk; return the logits of its last ``rows`` tokens, ``[B, rows, vocab]``."""
        feed = {n: np.ascontiguousarray(a) for n, a in zip(INPUTS, (ids, mask, positions), strict=True)}
        if self._can_skip_head:
            feed[LOGITS_START] = np.array([ids.shape[1] - rows], dtype=np.int64)
        try:
            logits: FloatArray = self._request.infer(feed)["logits"]
        except RuntimeError as e:
            hint = "free some memory, or give shorter prompts; `cushion-deploy verify` checks the bundle"
            raise CheckFailed(f"OpenVINO could not run {ids.shape[1]} tokens: {reason(e)}", hint=hint) from e
        self._length += ids.shape[1]
        return logits[:, logits.shape[1] - rows :]

    def _keep(self, length: int) -> None:
        """Keep the first ``length`` tokens; whatever a step that failed has appended comes behind them."""
        if not length:
            self.reset()
            return
        kept = self.contract.prefix_slots + length
        self._write([state.state.data[:, :, :kept].copy() for state in self._states])
        self._length = length

    def _write(self, caches: Sequence[npt.NDArray[Any]]) -> None:
        for state, cache in zip(self._states, caches, strict=True):
            state.state = self._tensor(cache)


def _states_in_order(request: Any, contract: GraphContract) -> list[Any]:
    """Return the states of a request, keys before values, layer by layer; raises UntrustedArtifact for others."""
    found = {state.name: state for state in request.query_state()}
    expected = state_names(contract)
    differing = sorted({*found} ^ {*expected})
    if differing:
        raise UntrustedArtifact(
            f"the compiled model is not that of the graph: {differing[0]} is a state of only one of them",
            hint="build the bundle again",
        )
    return [found[name] for name in expected]
