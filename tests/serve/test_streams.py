"""Streams of tokens that cut characters, emoji and stop strings: joined, they are the whole answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cushion_deploy.serve.api.answer import Answer
from cushion_deploy.serve.api.chat import ChatForm
from cushion_deploy.serve.api.chat_models import ChatRequest
from cushion_deploy.serve.api.completions import CompletionForm, CompletionRequest
from cushion_deploy.serve.api.stream import EventStream
from cushion_deploy.serve.api.token_text import TokenText
from cushion_deploy.serve.request import Delivery, SequenceRequest
from cushion_deploy.serve.sequence import Sequence

FAMILY = "👩\u200d👩\u200d👧\u200d👦"
"""One emoji of seven code points and 25 bytes."""
PIECES = [FAMILY, "👍🏽", "🇫🇷", "e\u0301", "ñ", "n\u0303", "中", "ש\u05c1", "क्षि", "한", "a", "b", " ", "\n", "the"]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join)


BRIEF = settings(deadline=None, max_examples=30, derandomize=True)


@cache
def token_text(tokenizer: Any) -> TokenText:
    """Return the texts of the tokens, which take a while to read."""
    return TokenText(tokenizer)


class Scripted:
    """What an answer needs of an engine: sequences that choose the given tokens, all before the answer is read."""

    name, bundle = "tiny", SimpleNamespace(chat_template=None)

    def __init__(self, tokenizer: Any, ids: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, ids

    def submit(self, requests: list[SequenceRequest], deliver: Callable[[int, Delivery], None]) -> list[Any]:
        for index, request in enumerate(requests):
            sequence = Sequence(request, self._tokenizer, frozenset([2]))
            for token in self._ids:
                logits = np.zeros(self._tokenizer.get_vocab_size(), dtype=np.float32)
                logits[token] = 9
                deliver(index, delivery := sequence.advance(logits))
                if delivery.end is not None:
                    break
        return []


def answers(tokenizer: Any, ids: list[int], stops: list[str], *, chat: bool) -> tuple[dict[str, Any], list[Any]]:
    """Return the one choice of a whole answer, and the choices of the chunks of a stream."""
    engine: Any = Scripted(tokenizer, ids)
    request = SequenceRequest((5,), len(ids), stop=tuple(stops), top_logprobs=0)
    tokens = token_text(tokenizer)
    messages: Any = [{"role": "user", "content": "x"}]

    def form() -> Any:
        if chat:
            return ChatForm(engine, ChatRequest(model="tiny", messages=messages, logprobs=True), tokens)
        return CompletionForm(engine, CompletionRequest(model="tiny", prompt="x", logprobs=0), tokens)

    async def both() -> tuple[dict[str, Any], list[Any]]:
        answer = Answer(engine, [request])
        await answer.collect(asyncio.Event().wait)  # type: ignore[arg-type]
        chunks = [chunk async for chunk in form().chunks(Answer(engine, [request]))]
        return form().whole(answer)["choices"][0], [choice for chunk in chunks for choice in chunk["choices"]]

    return asyncio.run(both())


def behind(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of tokens behind a prompt; some tokenizers begin it with a space."""
    return str(tokenizer.decode([5, *ids]))[len(tokenizer.decode([5])) :]


def cut(text: str, stops: list[str]) -> str:
    """Return a text up to the stop string that is complete first and, among those, begins first."""
    ends = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    if not ends:
        return text
    first = min(end for end, _ in ends)
    return text[: min(at for end, at in ends if end == first)]


def spans(text: str, ends: list[int], stops: list[str]) -> bool:
    """Return whether two stop strings are completed by the same token, which then decides by where they begin."""
    done = [next(i for i, end in enumerate(ends) if end >= at + len(s)) for s in stops if (at := text.find(s)) >= 0]
    return len(set(done)) < len(done)


@BRIEF
@given(text=texts, data=st.data())
def test_stream_and_whole_answer_are_the_text_up_to_the_first_stop(any_tokenizer: Any, text: str, data: Any) -> None:
    tokenizer = any_tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    text = behind(tokenizer, ids)
    at = data.draw(st.integers(0, len(text)))
    stop = text[at : at + data.draw(st.integers(1, 4))]
    stops = [s for s in (stop, data.draw(st.sampled_from([FAMILY, "\u0301", "zz"]))) if s]
    ends = [len(behind(tokenizer, ids[: i + 1]).rstrip("\ufffd")) for i in range(len(ids))]
    expected = cut(text, stops)
    whole, chunks = answers(tokenizer, ids, stops, chat=False)
    if not spans(text, ends, stops):
        assert whole["text"] == expected
    assert whole["finish_reason"] == ("stop" if any(s in text for s in stops) else "length")
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert not any("\ufffd" in chunk["text"] for chunk in chunks)
    chat, pieces = answers(tokenizer, ids, stops, chat=True)
    assert chat["message"]["content"] == whole["text"]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == whole["text"]


@BRIEF
@given(text=texts, stop=st.sampled_from(["", "e\u0301", FAMILY[:2], "b\n"]))
@example(text=FAMILY + "e\u0301", stop="")
def test_log_probabilities_stay_aligned_with_the_text(any_tokenizer: Any, text: str, stop: str) -> None:
    tokenizer = any_tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole, chunks = answers(tokenizer, ids, [stop] if stop else [], chat=False)
    told = whole["logprobs"]
    streamed = [chunk["logprobs"] for chunk in chunks]
    assert {key: [x for part in streamed for x in part[key]] for key in told} == told
    text, at = behind(tokenizer, ids), 0
    starts = []
    for token in ids[: len(told["tokens"])]:
        starts.append(len(text.encode()[:at].decode(errors="ignore")))
        at += len(token_text(tokenizer).bytes_of(token))
    assert told["text_offset"] == starts
    chat, pieces = answers(tokenizer, ids, [stop] if stop else [], chat=True)
    entries = chat["logprobs"]["content"]
    assert [entry for piece in pieces for entry in (piece["logprobs"] or {"content": []})["content"]] == entries
    raw = b"".join(bytes(entry["bytes"]) for entry in entries).decode(errors="ignore")
    assert raw.startswith(whole["text"])
    if not stop:
        assert raw == whole["text"] == text


def test_no_chunk_ends_in_the_middle_of_a_character(any_tokenizer: Any) -> None:
    ids = any_tokenizer.encode(FAMILY, add_special_tokens=False).ids
    assert len(ids) > len(FAMILY)
    _, chunks = answers(any_tokenizer, ids, [], chat=False)
    assert [chunk["text"] for chunk in chunks if chunk["text"]] == list(behind(any_tokenizer, ids))


@pytest.mark.parametrize("held", [1, 3])
def test_what_may_begin_a_stop_string_is_held_back_and_then_sent(any_tokenizer: Any, held: int) -> None:
    ids = any_tokenizer.encode("a👍b", add_special_tokens=False).ids
    stop = "a👍bcd"[: held + 2] + "!"
    whole, chunks = answers(any_tokenizer, ids, [stop], chat=False)
    assert whole["text"] == behind(any_tokenizer, ids)
    assert [chunk["text"] for chunk in chunks][-1].endswith("b")


async def _bodies_after_leaving(count: int, leave_after: int) -> tuple[int, int]:
    """Return how many events follow the callback that tells of the disconnect, and how often the stream ended."""
    gone, ended = asyncio.Event(), []
    sent = after = 0

    async def chunks() -> AsyncIterator[dict[str, Any]]:
        for number in range(count):
            yield {"number": number}

    async def receive() -> dict[str, str]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal sent, after
        sent += message["type"] == "http.response.body"
        after += sent > leave_after
        if sent == leave_after:  # as a socket does: the failed write schedules the notice
            asyncio.get_running_loop().call_soon(gone.set)

    stream = EventStream(chunks(), lambda: ended.append(True))
    await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
    return after, len(ended)


def test_ready_chunks_are_not_written_to_a_client_that_has_gone() -> None:
    after, ended = asyncio.run(_bodies_after_leaving(1000, 3))
    assert after <= 5  # asyncio warns from the sixth write on
    assert ended == 1
