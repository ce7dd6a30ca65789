"""Requests that mean no good: every one is answered with 200 or an error 400 in the form of the API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.parametrize("tiny", ["baked"], indirect=True)
HALF = "\ud800"
CHAT: Any = {"messages": [{"role": "user", "content": "x"}]}


def send(served: Any, body: Any) -> Any:
    """Send a body to the path that its fields belong to, and check the form of the answer."""
    path = "chat/completions" if "messages" in body else "completions"
    content = json.dumps({"model": "tiny", "max_tokens": 3, **body}).encode()
    done = served.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"}, timeout=60)
    assert done.status_code in (200, 400), (done.text, body)
    if done.status_code == 400:
        assert set(done.json()["error"]) == {"message", "type", "param", "code"}
        assert done.json()["error"]["message"]
    elif done.headers["content-type"].startswith("text/event-stream"):
        assert done.text.endswith("data: [DONE]\n\n")
    return done


def form(schema: Any) -> Any:
    return {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def nested(depth: int) -> Any:
    schema: Any = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": HALF},
        {"prompt": "x", "model": HALF},
        {"prompt": "x", HALF: 1},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        {"prompt": "x", "temperature": float("nan")},
        {"prompt": "x", "n": 10**400},
        {"prompt": [10**30]},
        {"prompt": [True]},
        form({"enum": [HALF]}),
        form({"$ref": "#"}),
        form({"$ref": "http://127.0.0.1:1/x"}),
        form({"type": "string", "pattern": "("}),
        form(nested(300)),
    ],
)
def test_what_has_no_meaning_is_refused(served: Any, body: Any) -> None:
    assert send(served, body).status_code == 400


@pytest.mark.parametrize(
    "body", [{"prompt": "x\0y"}, {"prompt": "x", "seed": -(10**400)}, {"prompt": "x", "stop": "\0"}]
)
def test_what_only_looks_strange_is_answered(served: Any, body: Any) -> None:
    assert send(served, body).status_code == 200


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 50_000, b'{"model":' + b"1" * 5000])
def test_bodies_that_break_parsers_are_refused(served: Any, content: bytes) -> None:
    done = served.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert done.status_code == 400
    assert "error" in done.json()


WORDS = ["type", "text", "role", "content", "name", "function", "schema", "properties", "$ref", "enum", "anyOf"]
LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-3, 400)
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.sampled_from(["auto", "required", "json_object", "function", "user", "tool", "object", "<tool_call>"])
)
VALUE = st.recursive(
    LEAF, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.sampled_from(WORDS), c, max_size=4), max_leaves=8
)
SOUND: Any = {
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "n": st.integers(1, 3),
    "seed": st.integers(),
    "stop": st.text(max_size=3),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.sampled_from(["1", "2", "50"]), st.floats(-100, 100), max_size=2),
    "stream": st.booleans(),
    "top_k": st.integers(0, 10),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 10),
}
FIELDS = ["n", "stop", "stream", "stream_options", "logprobs", "response_format", "tools", "tool_choice", "messages",
          "prompt", "logit_bias", "echo", "x"]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    body=st.sampled_from([CHAT, {"prompt": "x"}]),
    sound=st.fixed_dictionaries({}, optional=SOUND),
    wild=st.dictionaries(st.sampled_from(FIELDS), VALUE, max_size=2),
    schema=st.none() | VALUE,
)
def test_no_request_is_a_failure_of_the_server(served: Any, body: Any, sound: Any, wild: Any, schema: Any) -> None:
    chat = "messages" in body and schema is not None
    send(served, {**body, **(form(schema) if chat else {}), **sound, **wild})
