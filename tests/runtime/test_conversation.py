"""Conversations: every answer equals that of a model that reads the whole conversation anew."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime import load
from cushion_deploy.runtime.conversation import Conversation


@pytest.fixture(scope="module")
def generator(bundle_path: Path) -> Any:
    return load(bundle_path, threads=1)


@pytest.fixture
def talk(generator: Any) -> Conversation:
    return Conversation(generator, "b", max_new_tokens=4)


def said(talk: Conversation, text: str) -> str:
    return "".join(e.text for e in talk.answer(text))


def test_each_answer_is_that_to_the_whole_conversation(talk: Conversation, bundle_path: Path) -> None:
    again, messages = load(bundle_path, threads=1), [{"role": "system", "content": "b"}]
    for text in ("a", "c"):
        messages.append({"role": "user", "content": text})
        expected = again.chat(messages, max_new_tokens=4).text
        assert said(talk, text) == expected
        messages.append({"role": "assistant", "content": expected})
    assert talk.messages == messages


def test_an_answer_that_is_stopped_joins_as_far_as_it_was_read(talk: Conversation) -> None:
    whole = [e.text for e in Conversation(talk.generator, "b", max_new_tokens=4).answer("a")]
    with closing(talk.answer("a")) as events:
        read = "".join(next(events).text for _ in range(2))
    assert talk.turns == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "".join(whole[:2])}]
    assert read == "".join(whole[:2]) != "".join(whole)


def test_a_message_without_an_answer_is_forgotten(talk: Conversation) -> None:
    with pytest.raises(UsageError, match=r"conversation has \d{3} tokens.* 93"):
        list(talk.answer("word " * 100))
    assert talk.turns == []
    closing(talk.answer("a")).__exit__()
    assert talk.turns == []


def test_an_answer_takes_the_positions_that_are_left(talk: Conversation) -> None:
    talk.max_new_tokens = 10**6
    used = len(talk.generator.bundle.encode_chat([*talk.messages, {"role": "user", "content": "a"}]))
    events = list(talk.answer("a"))
    assert (len(events), events[-1].finish_reason) == (93 - used, "length")


def test_reset_keeps_the_system_message(talk: Conversation) -> None:
    first = said(talk, "a")
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "b"}]
    assert said(talk, "a") == first


def test_the_oldest_messages_are_forgotten_with_their_answers(talk: Conversation) -> None:
    for text in ("a", "c"):
        said(talk, text)
    kept = talk.turns[2:]
    assert (talk.forget(1), talk.turns) == (1, kept)
    assert (talk.forget(-1), talk.turns) == (0, kept)
    again = load(talk.generator.bundle.path, threads=1)
    messages = [*talk.messages, {"role": "user", "content": "a"}]
    assert said(talk, "a") == again.chat(messages, max_new_tokens=4).text
    assert (talk.forget(5), talk.turns) == (2, [])


def test_an_answer_that_ends_with_the_model_is_told_from_one_that_ends_before(talk: Conversation) -> None:
    usages = []
    for most in (4, 10**6):
        talk.max_new_tokens = most
        usages += [e.usage for e in talk.answer("a") if e.usage and e.finish_reason == "length"]
        talk.reset()
    assert [talk.is_full(usage) for usage in usages] == [False, True]


def test_saving_writes_a_new_file_only(talk: Conversation, tmp_path: Path) -> None:
    said(talk, "a")
    file = tmp_path / "c.jsonl"
    talk.save(file)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"messages": talk.messages}]
    with pytest.raises(UsageError, match="exists"):
        talk.save(file)
    with pytest.raises(UsageError, match="gone"):
        talk.save(tmp_path / "gone" / "c.jsonl")
