"""Prompt lookup: guesses against a search by hand, and the same tokens with and without them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime import PromptCache, SamplingParams, generate
from cushion_deploy.runtime.draft import NgramDraft, make_draft


def looked_up(history: list[int], most: int, longest: int, shortest: int, tokens: int) -> list[int]:
    """Search from the end, once for every size."""
    for size in range(longest, shortest - 1, -1):
        for end in range(len(history) - 1, size - 1, -1):
            if history[end - size : end] == history[-size:]:
                return history[end : end + min(tokens, most)]
    return []


@given(history=st.lists(st.integers(0, 3), max_size=40), step=st.integers(1, 5), most=st.integers(0, 6))
def test_a_guess_is_what_followed_the_latest_occurrence_of_the_longest_ngram(
    history: list[int], step: int, most: int
) -> None:
    draft = NgramDraft(longest=3, shortest=2, tokens=4)
    for end in range(0, len(history) + 1, step):
        assert draft.propose(history[:end], most) == looked_up(history[:end], most, 3, 2, 4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("length", [3, 40])
def test_the_tokens_are_those_without_a_draft(
    tiny: Any, tokenizer: Any, ids: Any, length: int, options: dict[str, Any]
) -> None:
    prompt, params = [*ids[0, :length].tolist(), *ids[0, :5].tolist()], SamplingParams(**options)
    expected = list(generate(tiny.session(), tokenizer, prompt, params, 45))
    found = list(generate(tiny.session(), tokenizer, prompt, params, 45, draft=NgramDraft(shortest=1)))
    assert [(e.token_id, e.text, e.finish_reason) for e in found] == [
        (e.token_id, e.text, e.finish_reason) for e in expected
    ]
    usage = found[-1].usage
    assert usage is not None
    assert usage.drafted_tokens > 0


class Known:
    """A draft that knows the answer, and is wrong wherever it is told to be."""

    def __init__(self, answer: list[int], prompt: int, wrong: set[int]) -> None:
        self._answer, self._prompt, self._wrong = answer, prompt, wrong

    def propose(self, history: Any, most: int) -> list[int]:
        at = len(history) - self._prompt
        guess = self._answer[at : at + min(most, 4)]
        return [(token + 1) % 384 if at + i in self._wrong else token for i, token in enumerate(guess)]


@pytest.mark.parametrize("wrong", [set(), {3}, {1, 2, 9}, set(range(24))])
def test_right_guesses_save_calls_and_wrong_ones_change_nothing(tiny: Any, tokenizer: Any, wrong: set[int]) -> None:
    prompt = [5, 6, 7]
    expected = [e.token_id for e in generate(tiny.session(), tokenizer, prompt, max_new_tokens=24)]
    session, calls = tiny.session(), []
    run = session.run
    session.run = lambda ids, **options: calls.append(ids.shape[1]) or run(ids, **options)
    cache = PromptCache(session)
    events = list(generate(session, tokenizer, prompt, max_new_tokens=24, cache=cache, draft=Known(expected, 3, wrong)))
    assert [e.token_id for e in events] == expected
    usage = events[-1].usage
    assert usage is not None
    # One call for the prompt, and one for each token that no guess had given.
    assert len(calls) == 24 - usage.accepted_tokens
    if not wrong:
        assert calls == [3, 5, 5, 5, 5, 3]
    # What the cache holds is known, also behind the last wrong guess.
    assert session.length == len(cache.ids)


def test_names_of_drafts() -> None:
    assert make_draft(None) is None
    assert isinstance(make_draft("ngram"), NgramDraft)
    with pytest.raises(UsageError, match="unknown draft 'medusa'"):
        make_draft("medusa")
