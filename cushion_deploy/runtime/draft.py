"""Drafts for speculative decoding without a second model: prompt lookup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cushion_deploy.errors import unknown_choice


class Draft(Protocol):
    """Guesses the tokens behind a text."""

    def propose(self, history: Sequence[int], most: int) -> list[int]:
        """Return up to ``most`` token ids that may follow ``history``; none if there is no guess.

        Args:
            history: the prompt and the tokens chosen so far; each call's begins with that of the call before.
            most: most tokens to return, 0 or more.
        """
        ...


class NgramDraft:
    """Prompt lookup (Saxena, 2023): what followed the last tokens where they occurred before follows again.

    The longest n-gram that occurred before decides, and of its occurrences the latest. This pays where an answer
    repeats its prompt: summaries, edits of code, questions about a document.

    Args:
        longest, shortest: tokens of the n-grams that are looked up.
        tokens: most tokens of a guess.
    """

    def __init__(self, longest: int = 4, shortest: int = 2, tokens: int = 8) -> None:
        """Start with nothing indexed."""
        self._sizes = range(longest, shortest - 1, -1)
        self._tokens = tokens
        self._behind: dict[tuple[int, ...], int] = {}
        """N-gram to the position behind its latest occurrence, of those that end before the last token."""
        self._indexed = 0

    def propose(self, history: Sequence[int], most: int) -> list[int]:
        """Return what followed the latest occurrence of the longest known n-gram."""
        self._index(history)
        for size in self._sizes:
            at = self._behind.get(tuple(history[-size:])) if size <= len(history) else None
            if at is not None:
                return list(history[at : at + min(self._tokens, most)])
        return []

    def _index(self, history: Sequence[int]) -> None:
        # The n-grams that end with the last token are not indexed before a token follows them.
        for end in range(self._indexed + 1, len(history)):
            for size in self._sizes:
                if size <= end:
                    self._behind[tuple(history[end - size : end])] = end
        self._indexed = max(self._indexed, len(history) - 1)


DRAFTS: dict[str, Callable[[], Draft]] = {"ngram": NgramDraft}
"""Drafts by their name on the command line. One draft serves one generation."""


def make_draft(name: str | None) -> Draft | None:
    """Return a new draft by its name, None for None; raises UsageError for an unknown one."""
    if name is None:
        return None
    if name not in DRAFTS:
        raise unknown_choice("draft", name, sorted(DRAFTS))
    return DRAFTS[name]()
