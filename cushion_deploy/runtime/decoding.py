"""The loop of decoding: feed the chosen token, with drafted tokens behind it, and choose the next one."""

from __future__ import annotations

from collections.abc import Sequence

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.runtime.draft import Draft
from cushion_deploy.runtime.prompt_cache import PromptCache
from cushion_deploy.runtime.sampling import Sampler


class Decoding:
    """Chooses the tokens behind a prompt, one call each.

    With a draft, several tokens are fed in one call: the chosen one and a guess of those behind it. A guess costs the
    time of a longer call and saves one call for every token that was guessed right. It decides nothing: each token is
    chosen from the logits behind those chosen before it, with one random number, as without a draft. The tokens are
    the same wherever logits do not depend on how many tokens a call feeds.

    Args:
        cache: the session with the tokens in its cache, of which those that the prompt begins with are kept.
        sampler: chooses a token from logits.
        prompt_ids: token ids of the prompt, at least one.
        draft: guesses tokens; None to feed one token in a call.

    Attributes:
        cached: tokens of the prompt that were in the cache.
        drafted: tokens that were guessed and fed.
        accepted: tokens that were guessed right.
    """

    def __init__(
        self, cache: PromptCache, sampler: Sampler, prompt_ids: Sequence[int], draft: Draft | None = None
    ) -> None:
        """Keep what the cache and the prompt have in common."""
        self._cache, self._sampler, self._draft = cache, sampler, draft
        self._history = list(prompt_ids)
        self.cached = cache.keep(prompt_ids)
        self.drafted = self.accepted = 0
        self._ahead: list[tuple[int, FloatArray]] = []
        """Tokens at the end of the cache that were guessed and not chosen yet, each with the logits behind it."""

    def first(self) -> int:
        """Feed the rest of the prompt and return the first token."""
        return self._choose(self._cache.feed(self._history[self.cached :]))

    def next(self, room: int) -> int:
        """Return the token behind the last one returned.

        Args:
            room: tokens that the caller still wants, at least 1.
        """
        last = self._history[-1]
        if self._ahead and self._ahead[0][0] == last:
            self.accepted += 1
            return self._choose(self._ahead.pop(0)[1])
        # The tokens behind a wrong guess were guessed behind that.
        self._cache.drop(len(self._ahead))
        self._ahead = []
        guess = self._draft.propose(self._history, room - 1) if self._draft and room > 1 else []
        if not guess:
            return self._choose(self._cache.feed([last]))
        rows = self._cache.feed_all([last, *guess])
        self.drafted += len(guess)
        self._ahead = list(zip(guess, rows[1:], strict=True))
        return self._choose(rows[0])

    def _choose(self, logits: FloatArray) -> int:
        token = self._sampler.next(logits, self._history)
        self._history.append(token)
        return token
