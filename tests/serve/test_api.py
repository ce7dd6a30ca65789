"""The OpenAI API over a real socket, through OpenAI's own client, against the sequential runtime."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from cushion_deploy.runtime import SamplingParams

pytestmark = pytest.mark.parametrize("tiny", ["baked"], indirect=True)
MESSAGES: Any = [{"role": "user", "content": "the fox"}]
GREEDY: Any = {"model": "tiny", "temperature": 0}
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_that_of_the_runtime(client: openai.OpenAI, generator: Any) -> None:
    got = client.completions.create(prompt="the quick", max_tokens=20, **GREEDY)
    expected = generator.generate("the quick", max_new_tokens=20)
    assert got.choices[0].text == expected.text
    assert got.choices[0].finish_reason == FINISH[expected.finish_reason]
    assert got.usage is not None
    assert got.usage.prompt_tokens == expected.usage.prompt_tokens
    assert got.usage.completion_tokens == expected.usage.new_tokens
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    # The client does not validate; its types do.
    Completion.model_validate(got.model_dump(), strict=True)


def test_a_chat_is_that_of_the_runtime(client: openai.OpenAI, generator: Any) -> None:
    got = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=20, **GREEDY)
    expected = generator.chat(MESSAGES, max_new_tokens=20)
    assert got.choices[0].message.content == expected.text
    assert got.choices[0].finish_reason == FINISH[expected.finish_reason]
    ChatCompletion.model_validate(got.model_dump(), strict=True)


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_chat_is_the_whole_one_in_pieces(client: openai.OpenAI, generator: Any, usage: bool) -> None:
    more: Any = {"stream_options": {"include_usage": True}} if usage else {}
    stream = client.chat.completions.create(messages=MESSAGES, max_tokens=20, stream=True, **GREEDY, **more)
    chunks = list(stream)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    events = list(generator.stream_chat(MESSAGES, max_new_tokens=20))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert pieces == [e.text for e in events if e.text]
    assert chunks[0].choices[0].delta.role == "assistant"
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons == [None] * (len(reasons) - 1) + [FINISH[events[-1].finish_reason]]
    assert [bool(c.choices) for c in chunks] == [True] * len(reasons) + [False] * usage
    last = chunks[-1].usage
    assert (last is not None) == usage
    if last is not None:
        assert (last.prompt_tokens, last.completion_tokens) == (events[-1].usage.prompt_tokens, len(events))
    assert len({c.id for c in chunks}) == 1


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: openai.OpenAI, generator: Any) -> None:
    stream = client.completions.create(prompt="the", max_tokens=20, stream=True, **GREEDY)
    assert "".join(c.choices[0].text for c in stream) == generator.generate("the", max_new_tokens=20).text


def test_many_at_once_are_each_that_of_the_runtime(client: openai.OpenAI, generator: Any) -> None:
    words = ["the", "fox", "naïve 中文", "def main(", "a", "lazy dog;", "wizards", "x ** 2", "box", "23"]

    def ask(i: int) -> str:
        return client.completions.create(
            prompt=words[i], model="tiny", max_tokens=5 + i, temperature=i % 2, seed=i, top_p=0.9
        ).choices[0].text  # fmt: skip

    with ThreadPoolExecutor(10) as pool:
        got = list(pool.map(ask, range(10)))
    expected = [
        generator.generate(word, params=SamplingParams(i % 2, top_p=0.9, seed=i), max_new_tokens=5 + i).text
        for i, word in enumerate(words)
    ]
    assert got == expected


def test_several_prompts_and_choices_are_numbered_in_order(client: openai.OpenAI, generator: Any) -> None:
    ids = generator.bundle.tokenizer.encode("the fox").ids
    got = client.completions.create(prompt=["the", "fox"], n=2, seed=5, model="tiny", temperature=1.5, max_tokens=6)
    assert [c.index for c in got.choices] == [0, 1, 2, 3]
    params = SamplingParams(1.5, seed=5)
    for choice, prompt in ((0, "the"), (2, "fox")):
        assert got.choices[choice].text == generator.generate(prompt, params=params, max_new_tokens=6).text
    assert len({c.text for c in got.choices}) > 2
    by_ids = client.completions.create(prompt=[ids, ids[:2]], max_tokens=6, **GREEDY)
    assert by_ids.choices[0].text == client.completions.create(prompt=ids, max_tokens=6, **GREEDY).choices[0].text
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == len(ids) + 2


def test_stop_texts_end_an_answer_and_are_not_in_it(client: openai.OpenAI, generator: Any) -> None:
    whole = generator.generate("the quick", max_new_tokens=30).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    got = client.completions.create(prompt="the quick", max_tokens=30, stop=[stop, "never there"], **GREEDY)
    assert got.choices[0].text == whole.partition(stop)[0]
    assert got.choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, generator: Any, tiny: Any) -> None:
    got = client.chat.completions.create(messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=4, **GREEDY)
    rendered = generator.bundle.chat_template.render(MESSAGES)
    ids = list(generator.bundle.tokenizer.encode(rendered, add_special_tokens=False).ids)
    expected = list(generator.stream_chat(MESSAGES, max_new_tokens=6))
    logprobs = got.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == len(expected)
    for event, entry in zip(expected, logprobs.content, strict=True):
        logits = tiny.session().run(np.array([ids]), need_logits="last")[0, -1].astype(float)
        reference = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        assert entry.logprob == pytest.approx(reference[event.token_id], abs=1e-3)
        assert [t.logprob for t in entry.top_logprobs] == pytest.approx(sorted(reference)[:-5:-1], abs=1e-3)
        ids.append(event.token_id)
    raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert raw.decode(errors="replace").startswith(got.choices[0].message.content or "")
    old = client.completions.create(prompt="the", max_tokens=6, logprobs=2, **GREEDY).choices[0].logprobs
    assert old is not None
    assert old.token_logprobs is not None
    assert len(old.token_logprobs) == 6


def test_penalties_and_bias_are_applied(client: openai.OpenAI, generator: Any) -> None:
    token = generator.bundle.tokenizer.encode("fox", add_special_tokens=False).ids[0]
    biased = client.completions.create(prompt="the", max_tokens=5, logit_bias={str(token): 100}, **GREEDY)
    assert biased.choices[0].text == generator.bundle.tokenizer.decode([token] * 5)
    spread = client.completions.create(
        prompt="the", max_tokens=5, logit_bias={str(token): 100}, frequency_penalty=2, presence_penalty=2, **GREEDY
    )
    assert spread.choices[0].text == biased.choices[0].text  # 2 + 5 * 2 is less than 100
    forbidden = client.completions.create(prompt="the", max_tokens=5, logit_bias={str(token): -100}, **GREEDY)
    assert "fox" not in forbidden.choices[0].text


def test_a_second_turn_computes_only_its_new_tokens(client: openai.OpenAI, generator: Any) -> None:
    first = client.chat.completions.create(
        messages=[{"role": "user", "content": "unheard of before"}], max_tokens=3, **GREEDY
    )
    again = client.chat.completions.create(
        messages=[
            {"role": "user", "content": "unheard of before"},
            {"role": "assistant", "content": first.choices[0].message.content},
            {"role": "user", "content": "x"},
        ],
        max_tokens=3,
        **GREEDY,
    )
    assert first.usage is not None
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_content_may_be_parts_or_null(client: openai.OpenAI) -> None:
    def ask(content: Any) -> Any:
        messages: Any = [{"role": "user", "content": content}, {"role": "assistant", "content": None}]
        return client.chat.completions.create(messages=messages, max_tokens=4, **GREEDY)

    plain, parts = ask("the fox"), ask([{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}])
    assert plain.usage.prompt_tokens == parts.usage.prompt_tokens
    assert plain.choices[0].message == parts.choices[0].message
    with pytest.raises(openai.BadRequestError, match="image_url"):
        ask([{"type": "image_url", "image_url": {"url": "data:"}}])


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10_000}, "messages"),
        ({"stop": [""]}, None),
        ({"stop": ["x"] * 99}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"top_logprobs": 3}, None),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"extra_body": {"guided_regex": "x"}}, "guided_regex"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "bad", "content": "x"}]}, "messages.0.role"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"tool_choice": "required"}, None),
    ],
)
def test_what_is_wrong_or_unsupported_is_refused_in_the_form_of_the_api(
    client: openai.OpenAI, change: Any, param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"messages": MESSAGES, **GREEDY, **change})
    body: Any = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["type"], body["param"]) == ("invalid_request_error", param)
    assert body["message"]


@pytest.mark.parametrize("change", [{"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"prompt": []}, {"prompt": [[]]}])
def test_completions_refuse_what_they_do_not_have(client: openai.OpenAI, change: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"prompt": "the", **GREEDY, **change})
    if change != {"prompt": [[]]}:
        return
    assert "no token" in str(caught.value)


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="x")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"{", "application/json"), (b"[]", "application/json"), (b"{}", "text/plain"), (b"\xff", "application/json")],
)
def test_a_body_that_is_no_request_is_refused(served: Any, content: bytes, kind: str) -> None:
    done = served.post("/v1/completions", content=content, headers={"content-type": kind})
    assert done.status_code == 400
    assert set(done.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_paths_and_methods_answer_in_the_form_of_the_api(served: Any) -> None:
    assert (served.get("/v1/nothing").status_code, served.get("/v1/completions").status_code) == (404, 405)
    assert "error" in served.get("/v1/nothing").json()


def test_text_arrives_in_whole_characters(served: Any, generator: Any) -> None:
    prompt = "日本語 👩‍🚀 e\u0301"
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 30, "temperature": 2, "seed": 1, "stream": True}
    lines = served.post("/v1/completions", json=body).content.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(line[6:])["choices"][0]["text"] for line in lines[:-2]]
    events = generator.stream(prompt, params=SamplingParams(2, seed=1), max_new_tokens=30)
    assert [p for p in pieces if p] == [e.text for e in events if e.text]


class Animal(BaseModel):
    legs: Literal[2, 4]
    tame: bool


def test_the_helper_that_parses_answers_works(client: openai.OpenAI) -> None:
    got = client.chat.completions.parse(messages=MESSAGES, response_format=Animal, **GREEDY)
    assert isinstance(got.choices[0].message.parsed, Animal)
