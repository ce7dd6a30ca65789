"""What real chat templates do with messages, rendered as transformers renders it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.chat import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": [1, 2]}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a <place> & more.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "enum": ["Zürich", "Bern"]},
                    "days": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                },
                "required": ["place"],
            },
        },
    }
]
PLAIN = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " Hi. "}]
CHATS: dict[str, list[dict[str, Any]]] = {
    "plain": PLAIN,
    "a system message": [{"role": "system", "content": "Be kind."}, *PLAIN],
    "tool calls with null": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny", "name": "weather"},
    ],
    "tool calls without content": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [CALL]},
    ],
}
IN_PARTS = [{"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}]}]
TEMPLATES = {
    "tools as JSON, calls as JSON": """
{%- if tools %}{{ 'Tools:' }}{% for tool in tools %}
{{ tool | tojson(indent=4) }}
{% endfor %}{% endif -%}
{%- for m in messages -%}
    {%- if m.role == 'assistant' and m.tool_calls -%}
        {%- for c in m.tool_calls -%}
            {%- set f = c.function if c.function is defined else c -%}
            <call>{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}</call>
        {%- endfor -%}
    {%- else -%}
        <{{ m.role }}>{{ m.content if m.content else '' }}
    {%- endif -%}
{%- endfor -%}""",
    "a macro that calls itself": """
{%- macro kind(s, depth) -%}
    {%- if s.type == 'array' -%}{{ kind(s['items'], depth + 1) }}[]
    {%- elif s.type == 'object' -%}
        { {%- for k, v in s.properties.items() %}{{ '  ' * depth }}{{ k }}{{ '' if k in (s.required or []) else '?' }}:
        {{- kind(v, depth + 1) }}; {% endfor -%} }
    {%- elif s.enum is defined -%}{{ s.enum | map('tojson') | join(' | ') }}
    {%- else -%}{{ s.type }}{%- endif -%}
{%- endmacro -%}
{%- for t in tools or [] -%}{{ t.function.name }}({{ kind(t.function.parameters, 0) }}){% endfor -%}
{%- for m in messages %}[{{ m.role }}]{% endfor %}""",
    "a loop that calls itself": """
{%- for key, value in (tools[0] if tools else {'a': {'b': {'c': 1}}}).items() recursive -%}
    {{ key }}={% if value is mapping %}({{ loop(value.items()) }}){% else %}{{ value }}{% endif %},
{%- endfor -%}
{%- for m in messages %}[{{ m.role }}]{% endfor %}""",
    "null is another case": """
{%- for m in messages -%}
    {{ m.role }}:
    {%- if m.content is defined and m.content is not none %} "{{ m.content }}"{% else %} (nothing){% endif %}
{% endfor %}""",
    "text or parts": """
{%- for m in messages -%}
    {{ m.role }}:
    {%- if m.content is string %}{{ m.content | trim }}
    {%- elif m.content is iterable %}{% for p in m.content %}<{{ p.type }}>{{ p.text }}{% endfor %}
    {%- endif %}
{% endfor %}""",
    "a system message of its own": """
{%- if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] %}{% set messages = messages[1:] %}
{%- else %}{% set first = 'You are helpful.' %}{% endif -%}
<sys>{{ first }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] or '' }}{% endfor %}""",
}


def of_transformers(tokenizer: Any, source: str, chat: Any, **variables: Any) -> str:
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    return str(reference.apply_chat_template(chat, chat_template=source, tokenize=False, **variables))


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_idiom_is_rendered_as_transformers_does(tokenizer: Any, name: str, chat: str, tools: Any) -> None:
    variables = {"tools": tools, "add_generation_prompt": False}
    expected = of_transformers(tokenizer, TEMPLATES[name], CHATS[chat], **variables)
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(CHATS[chat], **variables) == expected
    assert expected


def test_a_template_that_reads_parts_gets_them_as_they_are(tokenizer: Any) -> None:
    source = TEMPLATES["text or parts"]
    found = ChatTemplate(source, SPECIAL).render(IN_PARTS)
    assert found == of_transformers(tokenizer, source, IN_PARTS)
    assert "<text>One <text>two" in found


ONLY_PARTS = (
    "{% for m in messages %}{{ m.role | capitalize }}: {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% elif p.type == 'image' %}<image>{% endif %}{% endfor %}<end>\n{% endfor %}"
)


def test_a_template_that_reads_parts_alone_gets_text_as_one(tokenizer: Any) -> None:
    """As of SmolVLM: transformers, given the text itself, renders a message without it."""
    assert "Hello" not in of_transformers(tokenizer, ONLY_PARTS, PLAIN)
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN]
    expected = of_transformers(tokenizer, ONLY_PARTS, parts)
    assert ChatTemplate(ONLY_PARTS, SPECIAL).render(PLAIN) == expected
    assert ChatTemplate(ONLY_PARTS, SPECIAL).render(parts) == expected
    assert "Hello?" in expected


WITHOUT_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
)


def test_a_template_without_a_system_role_says_so(tokenizer: Any) -> None:
    template = ChatTemplate(WITHOUT_SYSTEM, SPECIAL)
    assert template.render(PLAIN) == of_transformers(tokenizer, WITHOUT_SYSTEM, PLAIN)
    with pytest.raises(UsageError, match="System role not supported"):
        template.render(CHATS["a system message"])
