"""Answers that must be JSON or calls of tools: a random model, which knows neither, gives them all the same."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.chat import ChatTemplate
from cushion_deploy.serve.api.chat_models import Tool
from cushion_deploy.serve.api.tools import ParsedCall, ToolParser, with_tools
from cushion_deploy.serve.constraints import Grammars

BAKED = pytest.mark.parametrize("tiny", ["baked"], indirect=True)
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
ASK: Any = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 3}
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA, "description": "d"}} for name in ("f", "g")
]
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}


@BAKED
def test_an_answer_has_its_schema_at_any_temperature(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(**ASK, n=3, temperature=1.5, response_format=FORMAT)
    values = [json.loads(choice.message.content or "") for choice in got.choices]
    for value in values:
        assert set(value) == {"a", "b"}
        assert value["a"] in (1, 2)
        assert isinstance(value["b"], bool)
    assert [choice.finish_reason for choice in got.choices] == ["stop"] * 3


@BAKED
def test_a_streamed_answer_has_its_schema(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(**ASK, stream=True, response_format=FORMAT)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert set(json.loads(text)) == {"a", "b"}


@BAKED
def test_any_object_is_an_object(client: openai.OpenAI) -> None:
    got = client.chat.completions.create(
        **ASK, temperature=0, response_format={"type": "json_object"}, logit_bias={"64": 50, "32": 20}, max_tokens=60
    )
    text = got.choices[0].message.content or ""
    assert text.lstrip().startswith("{")
    if got.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@BAKED
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
def test_a_call_is_forced_and_has_its_schema(client: openai.OpenAI, choice: Any) -> None:
    got = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        seed=4,
        tools=TOOLS[1:],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=60,
    )
    ChatCompletion.model_validate(got.model_dump(), strict=True)
    assert got.choices[0].finish_reason in ("tool_calls", "length")
    if got.choices[0].finish_reason == "tool_calls":
        (call,) = got.choices[0].message.tool_calls or ()
        assert call.type == "function"
        assert call.function.name == "g"
        assert set(json.loads(call.function.arguments)) == {"a", "b"}


@BAKED
@pytest.mark.parametrize(
    "change",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}}},
        {"tools": [*TOOLS, TOOLS[0]]},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}},
        {"tools": TOOLS, "response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nothing"}}}]},
        {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
    ],
)
def test_what_cannot_be_enforced_is_refused(client: openai.OpenAI, change: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**ASK, **change)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": true}}\n</tool_call>'


def walk(grammars: Grammars, tokenizer: Any, grammar: str, text: str) -> bool:
    """Return whether the grammar allows the text, token by token, and its end behind it."""
    import numpy as np

    (constraint,) = grammars.start(grammar)
    done = False
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        if done or np.isneginf(constraint.forbid(np.zeros(384, dtype=np.float32))[token]):
            return False
        done = constraint.accept(token)
    return done or bool(np.isfinite(constraint.forbid(np.zeros(384, dtype=np.float32))[2]))


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_grammar_of_calls_allows_what_it_says(tokenizer: Any, required: bool, parallel: bool) -> None:
    grammars = Grammars(tokenizer, 384, [2])
    grammar = grammars.tools({"f": SCHEMA}, required=required, parallel=parallel)
    expected = {
        CALL: True,
        f"{CALL}\n{CALL}": parallel,
        "some text": not required,
        f"text {CALL}": not required,
        CALL.replace('"f"', '"h"'): False,
        CALL.replace("1", "3"): False,
        CALL[:-3]: False,
    }
    assert {text: walk(grammars, tokenizer, grammar, text) for text in expected} == expected


def test_a_broken_schema_is_an_error_in_words(tokenizer: Any) -> None:
    grammars = Grammars(tokenizer, 384, [2])
    with pytest.raises(UsageError, match="schema cannot be used"):
        grammars.start(grammars.json_schema({"type": "nothing"}))


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_found_however_the_text_is_cut(size: int) -> None:
    text, parser = f"see <b>: {CALL}\n{CALL}", ToolParser()
    content, calls = "", []
    for at in range(0, len(text), size):
        more, found = parser.push(text[at : at + size])
        content, calls = content + more, calls + found
    assert content + parser.flush() == "see <b>: "
    assert calls == [ParsedCall("f", '{"a": 1, "b": true}')] * 2


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_tag_in_an_argument_does_not_end_the_call(size: int) -> None:
    arguments = {"s": 'a </tool_call> "b\\" </tool_call>', "t": "<tool_call>"}
    text = "<tool_call>\n" + json.dumps({"name": "f", "arguments": arguments}) + "\n</tool_call>"
    parser, calls = ToolParser(), list[ParsedCall]()
    for at in range(0, 2 * len(text), size):
        calls += parser.push((text * 2)[at : at + size])[1]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("f", arguments)] * 2
    assert parser.flush() == ""


@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{CALL}a\n\nb\n", "a\n\nb\n"),
        (f"{CALL}\n\na\nb", "a\nb"),
        (f"\na\nb\n\n{CALL}\n", "\na\nb"),
        (f"a\n{CALL}\n\n{CALL}\nb\n{CALL}", "ab"),
        ("\na\n\n", "\na\n\n"),
    ],
)
def test_only_the_newlines_beside_a_call_are_dropped(text: str, expected: str, size: int) -> None:
    parser = ToolParser()
    content = "".join(parser.push(text[at : at + size])[0] for at in range(0, len(text), size))
    assert content + parser.flush() == expected


def test_text_that_only_begins_like_a_call_is_text() -> None:
    parser = ToolParser()
    assert parser.push("a <tool_")[0] + parser.push("x")[0] + parser.push("<tool")[0] + parser.flush() == (
        "a <tool_x<tool"
    )


def test_tools_are_offered_by_the_template_or_described() -> None:
    tool = Tool.model_validate(TOOLS[0])
    knows = ChatTemplate("{% for t in tools %}{{ t.function.name }}<tool_call>{% endfor %}")
    messages: Any = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    same, variables = with_tools(knows, messages, [tool])
    assert same == messages
    assert knows.render(same, **variables) == "f<tool_call>"
    described, variables = with_tools(ChatTemplate("{{ messages }}"), messages, [tool])
    assert variables == {}
    assert [m["role"] for m in described] == ["system", "user", "assistant", "user"]
    assert '"name": "f"' in described[0]["content"]
    assert described[2]["content"] == '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    assert "7" in described[3]["content"]


@BAKED
@pytest.mark.parametrize("role", ["system", "user", "tool"])
@pytest.mark.parametrize(
    "part",
    [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}, {"type": "text", "text": 5}, {}],
)
def test_a_part_that_is_no_text_is_refused_with_tools_too(client: openai.OpenAI, role: str, part: Any) -> None:
    more = {"tool_call_id": "1"} if role == "tool" else {}
    message: Any = {"role": role, "content": [{"type": "text", "text": "x"}, part], **more}
    with pytest.raises(openai.BadRequestError, match="message 2"):
        client.chat.completions.create(
            model="tiny", messages=[*ASK["messages"], message], tools=TOOLS[:1], max_tokens=1
        )
    with pytest.raises(openai.BadRequestError, match="message 1"):
        client.chat.completions.create(model="tiny", messages=[message], tools=TOOLS[:1], max_tokens=1)


def test_parts_of_text_are_joined_where_tools_are_described() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: Any = [{"role": "system", "content": parts}, {"role": "tool", "tool_call_id": "1", "content": parts}]
    described, _ = with_tools(ChatTemplate("{{ messages }}"), messages, [Tool.model_validate(TOOLS[0])])
    assert described[0]["content"].startswith("ab\n\nYou may call")
    assert described[1]["content"] == "<tool_response>\nab\n</tool_response>"


@BAKED
def test_a_conversation_with_results_of_tools_is_answered(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "7"},
    ]
    got = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert got.choices[0].finish_reason in ("length", "stop")
    messages[1]["tool_calls"][0]["function"]["arguments"] = "[]"
    with pytest.raises(openai.BadRequestError, match="no JSON object"):
        client.chat.completions.create(model="tiny", messages=messages)


class Scripted:
    """A session that wants these tokens next, so that an answer with a call can be streamed."""

    def __init__(self, session: Any, tokens: list[int]) -> None:
        self.contract, self.length, self._tokens = session.contract, 0, iter(tokens)
        self.close = session.close

    def reset(self) -> None:
        self.length = 0

    def truncate(self, length: int) -> None:
        self.length = length

    def run(self, ids: Any, mask: Any = None, positions: Any = None, *, need_logits: str = "last") -> Any:
        import numpy as np

        self.length += ids.shape[1]
        if need_logits == "none":
            return None
        logits = np.zeros((1, 1, self.contract.vocab_size), dtype=np.float32)
        logits[0, 0, next(self._tokens)] = 50
        return logits


@BAKED
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("value", ["a", "a </tool_call> b"])
def test_text_and_calls_of_an_answer_are_separate(serve: Any, tokenizer: Any, streamed: bool, value: str) -> None:
    written = json.dumps({"name": "f", "arguments": {"s": value}})
    ids = [*tokenizer.encode(f"ok <tool_call>\n{written}\n</tool_call>", add_special_tokens=False).ids, 2]
    served = serve(change=lambda session: Scripted(session, ids))
    ask: Any = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    schema = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    if not streamed:
        got = served.client().chat.completions.create(**ask, tools=tools)
        message, reason = got.choices[0].message, got.choices[0].finish_reason
        content, calls = message.content, [c.function for c in message.tool_calls]
    else:
        chunks = list(served.client().chat.completions.create(**ask, tools=tools, stream=True))
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        deltas = [c.choices[0].delta for c in chunks]
        content = "".join(d.content or "" for d in deltas)
        calls = [call.function for d in deltas for call in d.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
    assert (content, reason) == ("ok ", "tool_calls")
    assert [(c.name, json.loads(c.arguments)) for c in calls] == [("f", {"s": value})]
