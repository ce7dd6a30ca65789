"""Rows of a session that are fed independently: several in one batch, or one at a time where an engine cannot batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.session import BatchSession, DecoderSession, NeedLogits, RowSlice
from cushion_deploy.runtime.prompt_cache import PromptCache
from cushion_deploy.serve.kv_pool import NOTHING, KvPool

EMPTY = RowSlice(NOTHING, 0, 0, 0)


class Rows(Protocol):
    """What the scheduler drives: rows that open, take their prompts in chunks, decode together, and close."""

    @property
    def capacity(self) -> int:
        """Most rows at a time."""
        ...

    def open(self, key: int, ids: Sequence[int]) -> int:
        """Open a row for a prompt; return how many of its first tokens are already in the cache, never all."""
        ...

    def prefill(self, key: int, ids: Sequence[int], *, last: bool) -> FloatArray | None:
        """Feed tokens to one row; return the logits after the last token, ``[vocab]``, or None unless ``last``."""
        ...

    def decode(self, tokens: Mapping[int, int]) -> dict[int, FloatArray]:
        """Feed one token to each of the given rows; return the logits after it, ``[vocab]``, by row."""
        ...

    def close(self, key: int) -> None:
        """Close a row, if it is open; its tokens may be found again by :meth:`open`."""
        ...


def open_rows(session: DecoderSession, capacity: int, pool: KvPool) -> Rows:
    """Return rows in batches of ``capacity`` where the session can batch, or one row at a time."""
    if isinstance(session, BatchSession):
        return BatchedRows(session, capacity, pool)
    return SingleRow(session)


class BatchedRows:
    """Rows of different lengths in one left-padded batch.

    A row is a slice of a cache. Rows that decoded together share one cache and are fed as they are; the caches are
    copied into a new one only when a row has joined or left.

    Args:
        session: the session; nothing else may use it.
        capacity: most rows.
        pool: where prompts and finished rows are kept.
    """

    def __init__(self, session: BatchSession, capacity: int, pool: KvPool) -> None:
        """Start without rows."""
        self.capacity = capacity
        self._session, self._pool = session, pool
        self._rows: dict[int, RowSlice] = {}
        self._ids: dict[int, list[int]] = {}

    def open(self, key: int, ids: Sequence[int]) -> int:
        """Copy the longest beginning of the prompt that the pool holds."""
        found = self._pool.find(ids)
        if 0 < found.length < found.cache.length:
            found = RowSlice(self._session.gather([found]), 0, 0, found.length)
        self._rows[key], self._ids[key] = found, list(ids[: found.length])
        return found.length

    def prefill(self, key: int, ids: Sequence[int], *, last: bool) -> FloatArray | None:
        """Feed a chunk; at the end of the prompt the pool gets its cache, which costs no copy."""
        row = self._rows[key]
        logits = self._run([key], [row], np.array([ids], dtype=np.int64), "last" if last else "none")
        if last:
            self._pool.add(self._ids[key], self._rows[key].cache)
        return None if logits is None else logits[0, -1]

    def decode(self, tokens: Mapping[int, int]) -> dict[int, FloatArray]:
        """Run one step of all the given rows."""
        keys = self._in_batch_order(tokens)
        rows = [self._rows[key] for key in keys]
        if not _is_batch(rows):
            cache = self._session.gather(rows)
            rows = [RowSlice(cache, i, cache.length - row.length, cache.length) for i, row in enumerate(rows)]
        logits = self._run(keys, rows, np.array([[tokens[key]] for key in keys], dtype=np.int64), "last")
        if logits is None:
            raise TypeError("the session returned no logits for need_logits='last'")
        return {key: logits[i, -1] for i, key in enumerate(keys)}

    def close(self, key: int) -> None:
        """Move the row to the pool, if it fits there."""
        row, ids = self._rows.pop(key, EMPTY), self._ids.pop(key, [])
        if not row.length or not self._pool.fits(row.cache.nbytes // row.cache.rows):
            return
        self._pool.add(ids, row.cache if _is_batch([row]) else self._session.gather([row]))

    def _in_batch_order(self, tokens: Mapping[int, int]) -> list[int]:
        """Return the rows with those of the last batch first, in its order, so that it needs no copy."""
        return sorted(tokens, key=lambda key: (self._rows[key].cache.rows == 1, self._rows[key].row, key))

    def _run(
        self, keys: Sequence[int], rows: Sequence[RowSlice], ids: IntArray, need_logits: NeedLogits
    ) -> FloatArray | None:
        """Feed ``ids``, ``[B, S]``, to rows that are a whole batch, and make the result their cache."""
        cache, new = rows[0].cache, ids.shape[1]
        mask = np.ones((len(rows), cache.length + new), dtype=np.int64)
        for i, row in enumerate(rows):
            mask[i, : row.begin] = 0
        self._session.restore(cache)
        try:
            logits = self._session.run(ids, mask, need_logits=need_logits)
        finally:
            after = self._session.hold()
        for i, (key, row) in enumerate(zip(keys, rows, strict=True)):
            self._rows[key] = RowSlice(after, i, row.begin, after.length)
            self._ids[key] += ids[i].tolist()
        return logits


def _is_batch(rows: Sequence[RowSlice]) -> bool:
    """Return whether rows are all rows of one cache, in order, with no slot that is padding in every row."""
    cache = rows[0].cache
    same = all(row.cache is cache and row.row == i and row.end == cache.length for i, row in enumerate(rows))
    return same and len(rows) == cache.rows and min(row.begin for row in rows) == 0


class SingleRow:
    """One row at a time, for sessions whose caches cannot be exchanged; what it computed last stays in the session.

    Args:
        session: the session; nothing else may use it.
    """

    capacity = 1

    def __init__(self, session: DecoderSession) -> None:
        """Start with an empty cache."""
        self._cache = PromptCache(session)

    def open(self, key: int, ids: Sequence[int]) -> int:
        """Keep the common beginning of the prompt and the last text."""
        return self._cache.keep(ids)

    def prefill(self, key: int, ids: Sequence[int], *, last: bool) -> FloatArray | None:
        """Feed a chunk."""
        if last:
            return self._cache.feed(ids)
        self._cache.feed_silently(ids)
        return None

    def decode(self, tokens: Mapping[int, int]) -> dict[int, FloatArray]:
        """Feed the token of the one row."""
        ((key, token),) = tokens.items()
        return {key: self._cache.feed([token])}

    def close(self, key: int) -> None:
        """Do nothing: the session keeps its cache."""
