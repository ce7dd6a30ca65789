"""The token ids in the cache of a session, so that a prompt that begins like the last one is not computed again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.errors import UsageError


class PromptCache:
    """A session of one row together with the tokens in its cache.

    All calls of the session go through this object; a token is recorded after the session has taken it. If a call is
    interrupted in between, the session holds more tokens than are recorded, and the recorded ones are still its first.

    Args:
        session: the session; whatever its cache holds is discarded.
    """

    def __init__(self, session: DecoderSession) -> None:
        """Start with an empty cache."""
        self.session = session
        self._ids: list[int] = []
        session.reset()

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens in the cache."""
        return tuple(self._ids)

    def clear(self) -> None:
        """Empty the cache."""
        self._ids = []
        self.session.reset()

    def keep(self, prompt_ids: Sequence[int]) -> int:
        """Keep what the cache and a prompt have in common from their beginning; return its length.

        At least the last token of the prompt is left to be fed, because the next token depends on its logits.
        """
        known = self._ids if self.session.length >= len(self._ids) else []
        common = common_beginning(known, prompt_ids[: len(prompt_ids) - 1])
        self._ids = self._ids[:common]
        if common:
            self.session.truncate(common)
        else:
            self.session.reset()
        return common

    def feed(self, ids: Sequence[int]) -> FloatArray:
        """Feed tokens; return the logits after the last one, float32 ``[vocab]``."""
        logits = self.session.run(np.asarray([ids], dtype=np.int64), need_logits="last")
        last: FloatArray = self._record(ids, logits)[-1]
        return last

    def feed_silently(self, ids: Sequence[int]) -> None:
        """Feed tokens without computing logits, such as all but the last part of a prompt."""
        self.session.run(np.asarray([ids], dtype=np.int64), need_logits="none")
        self._ids += ids

    def feed_all(self, ids: Sequence[int]) -> FloatArray:
        """Feed tokens; return the logits after each of them, float32 ``[S, vocab]``."""
        logits = self.session.run(np.asarray([ids], dtype=np.int64), need_logits="all")
        return self._record(ids, logits)

    def drop(self, count: int) -> None:
        """Remove the last tokens of the cache; raises UsageError if it holds fewer."""
        if not 0 <= count <= len(self._ids):
            raise UsageError(f"cannot drop {count} of {len(self._ids)} tokens", hint="drop at most what was fed")
        if count:
            # Recorded first: if the session is interrupted, it holds more than is recorded, which `keep` allows for.
            del self._ids[-count:]
            self.session.truncate(len(self._ids))

    def _record(self, ids: Sequence[int], logits: FloatArray | None) -> FloatArray:
        if logits is None:
            raise TypeError("the session returned no logits")
        self._ids += ids
        found: FloatArray = logits[0]
        return found


def common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
