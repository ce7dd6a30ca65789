"""Prompts that begin like the last one: fed once, and answered as if everything were computed again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime import PromptCache, SamplingParams, generate, load


class Counting:
    """A session that notes how many tokens it is fed, and is interrupted in one call if asked to."""

    def __init__(self, session: Any) -> None:
        self._session, self.contract = session, session.contract
        self.fed: list[int] = []
        self.interrupt = ""

    @property
    def length(self) -> int:
        return int(self._session.length)

    def reset(self) -> None:
        self._session.reset()

    def truncate(self, length: int) -> None:
        self._session.truncate(length)

    def run(self, ids: Any, *args: Any, **options: Any) -> Any:
        when, self.interrupt = self.interrupt, ""
        if when == "before":
            raise KeyboardInterrupt
        found = self._session.run(ids, *args, **options)
        if when == "behind":
            raise KeyboardInterrupt
        self.fed.append(ids.shape[1])
        return found


def tokens(session: Any, tokenizer: Any, prompt: list[int], count: int = 8, **options: Any) -> list[int]:
    return [e.token_id for e in generate(session, tokenizer, prompt, max_new_tokens=count, **options)]


def test_a_second_turn_feeds_its_new_tokens_only(tiny: Any, tokenizer: Any, ids: Any) -> None:
    session = Counting(tiny.session(chunk=16))
    cache = PromptCache(session)
    first = ids[0, :20].tolist()
    answer = tokens(session, tokenizer, first, cache=cache)
    session.fed.clear()
    second = [*first, *answer, *ids[0, 20:25].tolist()]
    events = list(generate(session, tokenizer, second, max_new_tokens=8, cache=cache))
    # The last token of an answer is not fed before something follows it.
    assert session.fed == [6, *[1] * 7]
    assert events[-1].usage.cached_tokens == 27
    assert [e.token_id for e in events] == tokens(tiny.session(), tokenizer, second)


@pytest.mark.parametrize("params", [None, SamplingParams(temperature=2.0, seed=3)])
def test_any_order_of_prompts_is_answered_as_by_an_empty_cache(
    tiny: Any, tokenizer: Any, params: SamplingParams | None
) -> None:
    random, session = np.random.default_rng(0), tiny.session(chunk=16)
    cache, prompt = PromptCache(session), [5, 6, 7]
    for _ in range(12):
        kept = int(random.integers(0, min(len(prompt), 40) + 1))
        prompt = [*prompt[:kept], *random.integers(3, 380, random.integers(1, 12)).tolist()]
        found = tokens(session, tokenizer, prompt, 6, params=params, cache=cache)
        assert found == tokens(tiny.session(), tokenizer, prompt, 6, params=params)
        assert len(cache.ids) == session.length
        prompt += found


def test_the_same_prompt_again_feeds_its_last_token(tiny: Any, tokenizer: Any) -> None:
    session = Counting(tiny.session())
    cache = PromptCache(session)
    expected = tokens(session, tokenizer, [5, 6, 7], cache=cache)
    session.fed.clear()
    assert tokens(session, tokenizer, [5, 6, 7], cache=cache) == expected
    assert session.fed == [1] * 8


@pytest.mark.parametrize("when", ["before", "behind"])
def test_an_interrupted_answer_leaves_a_cache_that_can_be_used(tiny: Any, tokenizer: Any, when: str) -> None:
    session = Counting(tiny.session())
    cache, prompt = PromptCache(session), [5, 6, 7, 8]
    events = generate(session, tokenizer, prompt, max_new_tokens=8, cache=cache)
    said = [next(events).token_id for _ in range(3)]
    session.interrupt = when
    with pytest.raises(KeyboardInterrupt):
        next(events)
    then = [*prompt, *said[:2], 9, 10]
    assert tokens(session, tokenizer, then, cache=cache) == tokens(tiny.session(), tokenizer, then)


def test_a_cache_that_another_caller_emptied_is_not_trusted(tiny: Any, tokenizer: Any) -> None:
    session = tiny.session()
    cache = PromptCache(session)
    expected = tokens(session, tokenizer, [5, 6, 7, 8], cache=cache)
    session.reset()
    assert tokens(session, tokenizer, [5, 6, 7, 8], cache=cache) == expected


def test_no_more_is_dropped_than_was_fed(tiny: Any) -> None:
    cache = PromptCache(tiny.session())
    cache.feed([5, 6])
    with pytest.raises(UsageError, match="cannot drop 3 of 2"):
        cache.drop(3)


def test_a_conversation_is_computed_once_if_asked_to(bundle_path: Any) -> None:
    messages = [{"role": "user", "content": "a"}]
    generator, again = load(bundle_path), load(bundle_path)
    for text in ("b", "c"):
        events = list(generator.stream_chat(messages, max_new_tokens=3, reuse=True))
        fresh = again.chat(messages, max_new_tokens=3)
        assert tuple(e.token_id for e in events) == fresh.token_ids
        assert fresh.usage.cached_tokens == 0
        messages += [{"role": "assistant", "content": fresh.text}, {"role": "user", "content": text}]
    assert events[-1].usage is not None
    assert events[-1].usage.cached_tokens > 4
    generator.generate("The quick", max_new_tokens=2)
    assert generator.chat(messages, max_new_tokens=3).token_ids == again.chat(messages, max_new_tokens=3).token_ids
