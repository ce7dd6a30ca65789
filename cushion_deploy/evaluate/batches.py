"""Log likelihoods of many requests in batches: contexts of almost equal length run together, each of them once.

The rows of a batch are aligned at the left. As many tokens as its shortest context has run first, of all rows; then,
for the first continuation of every row, for the second, and so on, the rest of the context and the continuation, padded
on the right. No token attends to one behind it, so padding needs no mask and changes no result, except under dynamic
scales per tensor, which cover all tokens that a row runs at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.evaluate.scorer import BoolArray, Scored, Scorer, common, token_losses

BATCH = 8
"""Contexts that run together."""
SLACK = 8
"""Tokens by which contexts of a batch may differ in length; these run again for every continuation."""
LOGITS = 256
"""Tokens of all rows whose logits are in memory at once."""
Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Row:
    """A context and its requests: the number of each, and its tokens, the context included."""

    context: list[int]
    requests: list[tuple[int, list[int]]]

    @property
    def length(self) -> int:
        """Tokens of the context."""
        return len(self.context)


def score_requests(
    scorer: Scorer, requests: Sequence[Pair], size: int = BATCH, progress: Progress = silent, task: str = ""
) -> list[Scored]:
    """Return the scores of all requests, in their order.

    Args:
        scorer: runs the requests; nothing else uses its session meanwhile.
        requests: token ids of context and continuation, at least one each.
        size: contexts per batch; 1 runs every request alone.
        progress, task: where to report the requests done, and as what.

    Raises:
        UsageError, CheckFailed: see :meth:`Scorer.loglikelihood`.
    """
    found: dict[int, Scored] = {}
    for batch in batches(_rows(scorer, requests), size, scorer.waste):
        if len(batch) > 1:
            found |= _together(scorer, batch)
        else:
            found |= {number: scorer.score(tokens, batch[0].length) for number, tokens in batch[0].requests}
        progress(task, len(found), len(requests))
    return [found[number] for number in range(len(requests))]


def batches(rows: Sequence[Row], size: int, waste: float) -> list[list[Row]]:
    """Return rows of almost equal length together, then those alone whose batch would run too many tokens.

    Args:
        rows: in an order in which contexts with a common beginning are neighbours.
        size: contexts per batch.
        waste: tokens that a batch may run, padding included, relative to one request at a time.
    """
    found: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.length):
        if found and len(found[-1]) < size and row.length <= found[-1][0].length + SLACK:
            found[-1].append(row)
        else:
            found.append([row])
    kept = [batch for batch in found if len(batch) > 1 and _tokens(batch) <= waste * _tokens_alone(batch)]
    together = {id(row) for batch in kept for row in batch}
    return [*kept, *([row] for row in rows if id(row) not in together)]


def _rows(scorer: Scorer, requests: Sequence[Pair]) -> list[Row]:
    """Return every context once, in an order in which those with a common beginning are neighbours."""
    rows: dict[tuple[int, ...], Row] = {}
    for number, (context, continuation) in enumerate(requests):
        tokens = scorer.fit(context, continuation)
        kept = tokens[: len(tokens) - len(continuation)]
        rows.setdefault(tuple(kept), Row(kept, [])).requests.append((number, tokens))
    for row in rows.values():
        row.requests.sort(key=lambda request: request[1])
    return [rows[key] for key in sorted(rows)]


def _tokens(batch: Sequence[Row]) -> int:
    """Return the tokens that a batch runs, padding included."""
    start = _start(batch)
    return len(batch) * (start + sum(max(map(len, turn)) - 1 - start for turn in _turns(batch)))


def _tokens_alone(batch: Sequence[Row]) -> int:
    """Return the tokens that run if a beginning shared with the context before is reused."""
    total, held = 0, list[int]()
    for row in sorted(batch, key=lambda row: row.context):
        continuations = sum(len(tokens) - row.length for _, tokens in row.requests)
        total += row.length - common(held, row.context, row.length) + continuations
        held = row.context
    return total


def _start(batch: Sequence[Row]) -> int:
    """Return the number of tokens that run once: all of the shortest context but its last, whose logits are needed."""
    return min(row.length for row in batch) - 1


def _turns(batch: Sequence[Row]) -> list[list[list[int]]]:
    """Return the tokens of every row for its first request, its second, and so on; a row without more repeats one."""
    most = max(len(row.requests) for row in batch)
    return [[row.requests[min(turn, len(row.requests) - 1)][1] for row in batch] for turn in range(most)]


def _together(scorer: Scorer, batch: Sequence[Row]) -> dict[int, Scored]:
    """Score the requests of several rows."""
    session, start, found = scorer.session, _start(batch), dict[int, Scored]()
    scorer.reset()
    try:
        if start:
            session.run(np.array([row.context[:start] for row in batch], dtype=np.int64), need_logits="none")
        for turn, texts in enumerate(_turns(batch)):
            session.truncate(start)
            for row, losses in zip(batch, _losses(scorer, texts, [row.length for row in batch], start), strict=True):
                if turn < len(row.requests):
                    found[row.requests[turn][0]] = scorer.total(*losses)
    finally:
        # The cache holds several rows, of which no single request can reuse the beginning.
        scorer.reset()
    return found


def _losses(
    scorer: Scorer, texts: Sequence[Sequence[int]], contexts: Sequence[int], start: int
) -> list[tuple[FloatArray, BoolArray]]:
    """Run the tokens behind ``start`` of every row; return losses and greedy flags of its continuation.

    Args:
        scorer: its session holds the first ``start`` tokens of every row.
        texts: tokens of each row.
        contexts: how many of these are the context.
        start: at least one less than the shortest context.
    """
    longest = max(map(len, texts))
    ids = np.zeros((len(texts), longest), dtype=np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    parts: list[list[tuple[FloatArray, BoolArray]]] = [[] for _ in texts]
    step = max(LOGITS // len(texts), 1)
    for begin in range(start, longest - 1, step):
        end = min(begin + step, longest - 1)
        logits = scorer.session.run(ids[:, begin:end], need_logits="all")
        if logits is None:
            raise TypeError("the session returned no logits although they were requested")
        for number, (text, context) in enumerate(zip(texts, contexts, strict=True)):
            # Logits at p predict the token at p + 1.
            first, last = max(begin, context - 1), min(end, len(text) - 1)
            if first < last:
                targets = ids[number, first + 1 : last + 1]
                parts[number].append(token_losses(logits[number, first - begin : last - begin], targets))
    return [(np.concatenate([a for a, _ in row]), np.concatenate([b for _, b in row])) for row in parts]
