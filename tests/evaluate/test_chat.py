"""Prompts of chats, against what transformers makes of the same conversations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cushion_deploy.evaluate.chat import MESSAGE_TOKENS, PROMPTS, chat_prompts
from cushion_deploy.runtime.bundle import TextFiles, read_text_files
from cushion_deploy.runtime.chat import ChatTemplate

PARAGRAPHS = [f"Paragraph {i} says that the fox is gone. " * 12 for i in range(40)]
TEXT = "\n\n".join(["A heading", *PARAGRAPHS])
BOS = 1


TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def files(tiny_folder: Path) -> TextFiles:
    return with_template(read_text_files(tiny_folder), TEMPLATE)


def with_template(files: TextFiles, source: str) -> TextFiles:
    assert files.chat_template is not None
    return replace(files, chat_template=ChatTemplate(source, files.chat_template.special_tokens))


def test_prompts_are_conversations_whose_message_is_cut(files: TextFiles, tiny_folder: Path) -> None:
    found = chat_prompts(files, TEXT)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    rows = [
        tokenizer.apply_chat_template([{"role": "user", "content": p[:400]}], tokenize=True, return_dict=False)
        for p in PARAGRAPHS
    ]
    assert all(row[0] == BOS for row in rows)
    assert (found.begin, found.missing) == ((BOS,), "")
    assert len(found.ids) == PROMPTS
    # A message of another kind tells where the template ends and the message begins, and where it goes on.
    other = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=True, return_dict=False)
    header, footer = (
        next(i for i, (a, b) in enumerate(zip(one, another, strict=False)) if a != b)
        for one, another in ((rows[0], other), (rows[0][::-1], other[::-1]))
    )
    assert footer > 0
    expected = [row[1 : header + MESSAGE_TOKENS] + row[-footer:] for row in rows]
    assert {tuple(row) for row in found.ids.tolist()} < set(map(tuple, expected))
    # Spread over the text: the first and the last paragraph are among them, and the heading is too short.
    assert found.ids[0].tolist() == expected[0]
    assert found.ids[-1].tolist() == expected[-1]
    assert found.ends == files.eos_token_ids


def test_a_template_without_bos_has_what_the_tokenizer_puts_before_every_text(files: TextFiles) -> None:
    found = chat_prompts(with_template(files, "[{{ messages[0].content }}]"), TEXT)
    assert found.begin == (BOS,)
    assert found.ids.shape[1] == 1 + MESSAGE_TOKENS + 1


def test_the_same_prompts_on_every_day(files: TextFiles) -> None:
    found = chat_prompts(with_template(files, "{{ strftime_now('%Y-%m-%d') }}: {{ messages[0].content }}"), TEXT)
    assert files.tokenizer.decode(found.ids[0].tolist()).startswith("2025-01-01: Paragraph 0")


def test_a_text_of_short_lines_is_one_prompt(files: TextFiles) -> None:
    found = chat_prompts(files, "The fox is gone.\n\n" * 30)
    assert len(found.ids) == 1


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "the model has no chat template"),
        ("{{ raise_exception('no user today') }}", "the chat template rejects these messages: no user today"),
        ("", "the chat template makes no prompt of two tokens"),
    ],
)
def test_without_prompts_the_reason_is_said(files: TextFiles, source: str | None, reason: str) -> None:
    found = chat_prompts(replace(files, chat_template=None) if source is None else with_template(files, source), TEXT)
    assert found.missing == reason
    assert found.ids.size == 0


def test_prompts_are_identified_by_their_tokens(files: TextFiles) -> None:
    found = chat_prompts(files, TEXT)
    assert found.digest == chat_prompts(files, TEXT).digest
    assert found.digest != replace(found, ids=found.ids + 1).digest
    assert found.digest != replace(found, begin=()).digest
    assert found.digest != replace(found, ends=(3,)).digest
