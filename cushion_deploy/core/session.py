"""The protocol of a decoder session, and what the sessions of all engines share.

Shapes in comments: B batch, S new tokens, T tokens in the cache after the step, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.errors import UsageError

if TYPE_CHECKING:
    from cushion_deploy.core.kv_scales import KvScales

NeedLogits = Literal["all", "last", "none"]
NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float32, "int8": np.int8}
"""Types of caches in host memory; numpy has no bfloat16, so that is float32 there."""
CACHE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Bytes per element of a cache in device memory."""
_SCALES = "keep kv_scales.json in the folder of the graph"
INPUTS = ("input_ids", "attention_mask", "position_ids")


class DecoderSession(Protocol):
    """A loaded decoder with its cache. Lengths count the caller's tokens; the prefix is not visible."""

    contract: GraphContract

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included."""
        ...

    def run(
        self,
        ids: IntArray,
        mask: IntArray | None = None,
        positions: IntArray | None = None,
        *,
        need_logits: NeedLogits = "last",
    ) -> FloatArray | None:
        """Feed tokens after those in the cache.

        Args:
            ids: int64 ``[B, S]``.
            mask: int64 ``[B, length + S]``, 1 for tokens and 0 for left padding; None if nothing is padded.
            positions: int64 ``[B, S]``, position of each token in its row, padding not counted; None to derive them
                from the mask.
            need_logits: which of the S tokens to return logits for.

        Returns:
            float32 ``[B, S, vocab]`` for ``all``, ``[B, 1, vocab]`` for ``last``, None for ``none``.

        Raises:
            UsageError: shapes that do not match each other, or more tokens than the model has positions for.
        """
        ...

    def reset(self) -> None:
        """Empty the cache."""
        ...

    def truncate(self, length: int) -> None:
        """Keep only the first ``length`` tokens of the cache; raises UsageError if it holds fewer."""
        ...

    def close(self) -> None:
        """Free what the garbage collector does not: device memory."""
        ...


def remarks(session: DecoderSession) -> tuple[str, ...]:
    """Return what a user should know of how a session computes, without periods; empty for most engines."""
    found: tuple[str, ...] = getattr(session, "remarks", ())
    return found


@dataclass(frozen=True)
class HeldCache:
    """A cache that was taken out of a session; only a session of the same graph can run it. Never altered in place.

    Attributes:
        values: keys and values in the order of :func:`past_names`, ``[rows, K, prefix slots + length, D]`` each, in a
            type of the engine; empty if there is no token.
        rows: B.
        length: tokens of each row, padding included.
        nbytes: bytes of all values.
    """

    values: tuple[Any, ...] = ()
    rows: int = 0
    length: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class RowSlice:
    """The tokens from ``begin`` to ``end`` of one row of a cache."""

    cache: HeldCache
    row: int
    begin: int
    end: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.end - self.begin


@runtime_checkable
class BatchSession(DecoderSession, Protocol):
    """A session whose caches can be exchanged and put together row by row, as continuous batching needs."""

    def hold(self) -> HeldCache:
        """Take the cache out, which copies nothing; the session is empty afterwards."""
        ...

    def restore(self, cache: HeldCache) -> None:
        """Continue with a cache of this session, in place of its present one; copies nothing."""
        ...

    def gather(self, slices: Sequence[RowSlice]) -> HeldCache:
        """Copy rows into one cache, each behind zeros that pad it on the left to the longest; the prefix stays first.

        A step after it needs a mask with 0 for the padding. Raises UsageError if there is no row or an empty one.
        """
        ...


def held_bytes(contract: GraphContract, rows: int, length: int) -> int:
    """Return the bytes of the keys and values of a cache, the slots of its prefix included."""
    slots = contract.prefix_slots + length
    a_token = 2 * contract.num_layers * contract.num_kv_heads * contract.head_dim * CACHE_BYTES[contract.cache_dtype]
    return rows * slots * a_token


def context_limit(contract: GraphContract) -> int:
    """Return the longest context of a caller in tokens: the positions that the prefix does not take."""
    return contract.max_positions - contract.prefix_length


def require_kept(length: int, held: int) -> None:
    """Check that ``length`` of ``held`` cached tokens can be kept; raises UsageError if there are fewer."""
    if not 0 <= length <= held:
        raise UsageError(f"cannot keep {length} tokens of a cache of {held}", hint="give at most the session's length")


def past_names(contract: GraphContract) -> list[str]:
    """Return the names of the cache inputs, layer by layer, keys before values."""
    return [f"past_key_values.{i}.{part}" for i in range(contract.num_layers) for part in ("key", "value")]


def cached_prefix(graph: ExportedGraph) -> Prefix | None:
    """Read the prefix that every cache of a graph begins with, or None if it is not in the cache; see ``artifacts``."""
    if not graph.contract.prefix_slots:
        return None
    # Imported here because only such a bundle needs safetensors to run.
    from cushion_deploy.core.artifacts import read_cached_prefix

    return read_cached_prefix(graph)


def cached_scales(graph: ExportedGraph) -> KvScales | None:
    """Read the scales of an INT8 cache, or None if the cache is in floating point; see ``artifacts``."""
    if not graph.contract.quantized_cache:
        return None
    from cushion_deploy.core.artifacts import read_cached_scales

    return read_cached_scales(graph)


def first_caches(
    contract: GraphContract, prefix: Prefix | None, batch: int, kv: KvScales | None = None
) -> list[npt.NDArray[Any]]:
    """Return the initial content of every cache, ``[B, K, P, D]`` in the order of :func:`past_names`.

    P is the length of the prefix, or 0 if the cache begins empty.

    Args:
        contract: contract of the graph.
        prefix: what the cache begins with, if the contract says so.
        batch: B.
        kv: scales of an INT8 cache; needed to quantize a prefix.

    Raises:
        UsageError: the contract requires a prefix of another length than the given one, or its scales are missing.
    """
    found = prefix.length if prefix else 0
    if found != contract.prefix_slots:
        raise UsageError(
            f"every cache begins with a prefix of {contract.prefix_slots} positions, the given one has {found}",
            hint="keep prefix.safetensors in the folder of the graph",
        )
    dtype = NUMPY_TYPES[contract.cache_dtype]
    if prefix is None:
        return [np.zeros((batch, contract.num_kv_heads, 0, contract.head_dim), dtype)] * (2 * contract.num_layers)
    parts: tuple[npt.NDArray[Any], npt.NDArray[Any]] = prefix.keys, prefix.values
    if contract.quantized_cache:
        if kv is None:
            raise UsageError("an INT8 cache begins with a prefix, and its scales are missing", hint=_SCALES)
        parts = kv.codes(prefix)
    elif contract.dtype == "bfloat16":
        parts = bfloat16_values(prefix.keys), bfloat16_values(prefix.values)
    layers = (part[i] for i in range(contract.num_layers) for part in parts)
    return [np.ascontiguousarray(np.broadcast_to(x.astype(dtype), (batch, *x.shape))) for x in layers]


def bfloat16_bits(x: FloatArray) -> npt.NDArray[np.uint16]:
    """Return finite float32 values rounded to bfloat16, half to even, as bit patterns."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bfloat16_values(x: FloatArray) -> FloatArray:
    """Return finite float32 values rounded to bfloat16, as float32."""
    return (bfloat16_bits(x).astype(np.uint32) << 16).view(np.float32)


def count_positions(mask: IntArray, new: int) -> IntArray:
    """Return the positions of the last ``new`` tokens, int64 ``[B, new]``; left padding is not counted.

    Args:
        mask: int64 ``[B, T]``.
        new: S.
    """
    counted: IntArray = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, mask.shape[1] - new :]
    return counted


def checked_inputs(
    contract: GraphContract,
    length: int,
    rows: int | None,
    ids: IntArray,
    mask: IntArray | None,
    positions: IntArray | None,
) -> tuple[IntArray, IntArray]:
    """Check the arguments of a call, and return mask and positions as the graph takes them, prefix slots included.

    Args:
        contract: contract of the graph.
        length: tokens in the cache.
        rows: batch size of the cache; None if it is empty.
        ids, mask, positions: arguments of :meth:`DecoderSession.run`.

    Raises:
        UsageError: shapes that do not match each other, or more tokens than the model has positions for.
    """
    if ids.ndim != 2 or ids.dtype != np.int64 or not ids.size:
        raise UsageError(
            f"token ids are {ids.dtype} {list(ids.shape)}, expected int64 [batch, sequence], not empty",
            hint="give a prompt that is not empty",
        )
    batch, new = ids.shape
    total = length + new
    if rows is not None and rows != batch:
        raise UsageError(
            f"batch of {batch} rows, the cache has {rows}",
            hint="call reset() before a new batch",
        )
    limit = context_limit(contract)
    # Left padding takes no position, but some row may have none.
    if total > limit:
        raise UsageError(
            f"a context of {total} tokens is longer than the {limit} that the engine supports",
            hint=f"shorten the prompt or ask for fewer new tokens, {limit} in total",
        )
    if ids.min() < 0 or ids.max() >= contract.vocab_size:
        raise UsageError(
            f"token id {ids.min() if ids.min() < 0 else ids.max()} is outside the vocabulary of {contract.vocab_size}",
            hint="encode the text with the bundle's own tokenizer",
        )
    if mask is None:
        mask = np.ones((batch, total), dtype=np.int64)
    if mask.shape != (batch, total) or mask.dtype != np.int64:
        raise UsageError(
            f"attention mask is {mask.dtype} {list(mask.shape)}, expected int64 {[batch, total]}",
            hint="the mask covers the tokens in the cache and the new ones",
        )
    if positions is None:
        positions = count_positions(mask, new)
    if positions.shape != (batch, new) or positions.dtype != np.int64:
        raise UsageError(
            f"positions are {positions.dtype} {list(positions.shape)}, expected int64 {[batch, new]}",
            hint="omit them to derive them from the mask",
        )
    if slots := contract.prefix_slots:
        mask, positions = np.concatenate([np.ones((batch, slots), dtype=np.int64), mask], axis=1), positions + slots
    return mask, positions
