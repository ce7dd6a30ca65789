"""Chat templates against transformers' rendering of them."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from cushion_deploy.errors import MissingDependency, UsageError
from cushion_deploy.runtime.chat import ChatTemplate, encode_chat, encode_prompt

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind. "},
    {"role": "user", "content": "Où est 'le' café?\n"},
    {"role": "assistant", "content": "Là-bas."},
    {"role": "user", "content": 'Say "non".'},
]
TEMPLATES = {
    "white space": "{% for m in messages %}\n    {% if true %}\n{{ m.role }}: {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}",
    "special tokens": "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}",
    "generation prompt": "{{ messages[0].content }}{% if add_generation_prompt %}>>{% endif %}",
    "tojson": "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} "
    "{{ {'b': 'é<', 'a': 1} | tojson(sort_keys=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "generation block": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "absent names": "{% if tools %}tools{% endif %}{% if not documents %}none{% endif %}{{ undefined_name }}"
    "{{ tools is none }}{{ pad_token is defined }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "methods": "{% for m in messages %}{{ m['content'].strip().split(' ')[0] | upper }};{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_rendering_equals_transformers(tokenizer: Any, name: str, prompt: bool) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    expected = reference.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=prompt
    )
    got = ChatTemplate(TEMPLATES[name], SPECIAL).render(MESSAGES, add_generation_prompt=prompt)
    assert got == expected
    assert got


def test_ids_equal_transformers_and_hold_one_bos(tokenizer: Any) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
    source = TEMPLATES["special tokens"]
    expected = reference.apply_chat_template(MESSAGES, chat_template=source, tokenize=True, return_dict=True)
    got = encode_chat(tokenizer, ChatTemplate(source, SPECIAL).render(MESSAGES))
    assert got == expected["input_ids"]
    assert got.count(1) == 1


def test_bos_is_added_where_the_template_leaves_it_out_and_the_tokenizer_adds_it(
    tokenizer: Any, fallback_tokenizer: Any
) -> None:
    assert encode_chat(tokenizer, "fox", 1) == tokenizer.encode("fox").ids
    assert encode_chat(tokenizer, "<s>fox", 1) == tokenizer.encode("fox").ids
    assert encode_chat(fallback_tokenizer, "fox", 1) == fallback_tokenizer.encode("fox").ids
    assert encode_chat(tokenizer, "fox", None) == tokenizer.encode("fox", add_special_tokens=False).ids


CONTENTS = {
    "null": (None, ""),
    "parts": ([{"type": "text", "text": "Où "}, {"text": "est-ce?"}], "Où est-ce?"),
    "no part": ([], ""),
}


@pytest.mark.parametrize(("content", "text"), CONTENTS.values(), ids=CONTENTS)
def test_content_that_is_null_or_in_parts_renders_as_its_text(content: Any, text: str) -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}|{{ m.name }}{% endfor %}")
    given = [{"role": "user", "content": content, "name": "Ada"}, {"role": "assistant"}]
    assert template.render(given) == f"<user>{text}|Ada<assistant>|"


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "message 2 has a part of type 'image"),
        ({"role": "user", "content": ["hi"]}, "message 2 has a part of type str"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "message 2 has a text part without text"),
        ({"role": "user", "content": 3}, "content of message 2 is int"),
        ("hi", "message 2 is str"),
    ],
)
def test_content_of_another_kind_is_refused_by_the_number_of_its_message(message: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        ChatTemplate("{{ messages[1].content }}").render([MESSAGES[0], message])


@pytest.mark.parametrize(
    "source", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"]
)
def test_a_template_without_end_is_an_error(source: str) -> None:
    with pytest.raises(UsageError, match="without end, or is nested too deeply"):
        ChatTemplate(source).render(MESSAGES)


def test_plain_prompt_gets_bos_once(tokenizer: Any) -> None:
    plain = tokenizer.encode("fox", add_special_tokens=False).ids
    assert encode_prompt(tokenizer, "fox", 1) == [1, *plain]
    assert encode_prompt(tokenizer, "<s>fox", 1) == [1, *plain]
    assert encode_prompt(tokenizer, "fox", None) == [1, *plain]


def test_tokenizer_without_bos_adds_none(fallback_tokenizer: Any) -> None:
    assert encode_prompt(fallback_tokenizer, "fox", 1)[0] != 1
    assert encode_prompt(fallback_tokenizer, "<s><s>fox", 1)[:2] == [1, 1]


def test_refusal_of_the_template_is_the_message() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="rejects these messages: roles must alternate"):
        template.render(MESSAGES)


def test_date_is_todays() -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    got = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}").render(MESSAGES)
    assert before <= got <= datetime.now().strftime("%Y-%m-%d")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% if %}",
        "{{ messages[0].content / 2 }}",
        "{{ messages[99].content.strip() }}",
    ],
)
def test_hostile_or_broken_template_is_an_error(source: str) -> None:
    with pytest.raises(UsageError, match="chat template rejects"):
        ChatTemplate(source).render(MESSAGES)


def test_no_message_is_an_error() -> None:
    with pytest.raises(UsageError, match="has no message"):
        ChatTemplate("x").render([])


def test_missing_jinja2_carries_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependency) as caught:
        ChatTemplate("x").render(MESSAGES)
    assert caught.value.hint == "pip install 'cushion-deploy[chat]'"


def test_behind_a_prefix_that_begins_with_bos_no_text_brings_it_again(tokenizer: Any) -> None:
    plain = tokenizer.encode("fox", add_special_tokens=False).ids
    for text in ("fox", "<s>fox"):
        assert encode_prompt(tokenizer, text, 1, keep_bos=False) == plain
        assert encode_chat(tokenizer, text, 1, keep_bos=False) == plain
    assert encode_chat(tokenizer, "<s>fox", 1) == [1, *plain]
    assert encode_prompt(tokenizer, "fox", None, keep_bos=False) == [1, *plain]
