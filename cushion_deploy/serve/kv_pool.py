"""Keys and values of earlier texts, kept so that a text with the same beginning does not compute it again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from cushion_deploy.core.session import HeldCache, RowSlice
from cushion_deploy.runtime.prompt_cache import common_beginning

NOTHING = HeldCache()


class KvPool:
    """A bounded number of bytes of caches of one row each; what was used longest ago is evicted first.

    A text whose beginning is another text of the pool replaces it. A cache is immutable, so the pool shares it with the
    row that still runs.

    Args:
        capacity: most bytes; 0 keeps nothing.

    Attributes:
        nbytes: bytes of all caches.
        evictions: texts evicted so far.
    """

    def __init__(self, capacity: int) -> None:
        """Start empty."""
        self.capacity = capacity
        self.nbytes = 0
        self.evictions = 0
        self._entries: OrderedDict[int, tuple[tuple[int, ...], HeldCache]] = OrderedDict()
        self._next = 0

    def __len__(self) -> int:
        return len(self._entries)

    def fits(self, nbytes: int) -> bool:
        """Return whether a cache of this size could be kept, if need be in place of all others."""
        return 0 < nbytes <= self.capacity

    def add(self, ids: Sequence[int], cache: HeldCache) -> None:
        """Keep the cache of a text.

        Args:
            ids: the tokens that the cache holds.
            cache: one row without padding, ``cache.length == len(ids)``; not kept if it is larger than the pool.
        """
        if not self.fits(cache.nbytes):
            return
        text = tuple(ids)
        for key, (kept, _) in list(self._entries.items()):
            common = common_beginning(kept, text)
            if common == len(text):  # it is the beginning of a text that is here
                self._entries.move_to_end(key)
                return
            if common == len(kept):
                self.nbytes -= self._entries.pop(key)[1].nbytes
        self._entries[self._next] = (text, cache)
        self._next += 1
        self.nbytes += cache.nbytes
        while self.nbytes > self.capacity:
            self.nbytes -= self._entries.popitem(last=False)[1][1].nbytes
            self.evictions += 1

    def find(self, ids: Sequence[int]) -> RowSlice:
        """Return the longest beginning of a text that the pool holds, without its last token; it may be empty.

        The last token is left out because its logits are not kept.
        """
        text = tuple(ids[:-1])
        best, longest = None, 0
        for key, (kept, _) in self._entries.items():
            common = common_beginning(kept, text)
            if common > longest:
                best, longest = key, common
        if best is None:
            return RowSlice(NOTHING, 0, 0, 0)
        self._entries.move_to_end(best)
        return RowSlice(self._entries[best][1], 0, 0, longest)
