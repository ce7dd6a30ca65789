"""Prompts of a chat: passages of a text as the user's message, in the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.errors import MissingDependency, UsageError
from cushion_deploy.runtime.bundle import TextFiles
from cushion_deploy.runtime.chat import ChatTemplate, encode_chat
from cushion_deploy.store.digests import digest_json

PROMPTS, MESSAGE_TOKENS, ANSWER_TOKENS = 8, 32, 32
"""Prompts, tokens of each message, and tokens of the answer that the original model gives."""
PASSAGE = 400
"""Characters of a passage: more than the tokens of a message take."""
TODAY = datetime(2025, 1, 1)
"""The date for templates that state one, so that prompts are the same on every day."""


@dataclass(frozen=True)
class ChatPrompts:
    """Prompts of equal length.

    Attributes:
        ids: int64 ``[prompts, length]``, without a beginning-of-sequence token; an answer follows.
        begin: that token if the template begins with it; a prefix takes its place.
        ends: tokens that end an answer.
        missing: why there are no prompts; empty if there are.
    """

    ids: IntArray
    begin: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    missing: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over everything."""
        return digest_json([self.ids.tolist(), list(self.begin), list(self.ends), self.missing])


def chat_prompts(files: TextFiles, text: str) -> ChatPrompts:
    """Return prompts with passages of a text, spread over it, as the user's message.

    Each message has ``MESSAGE_TOKENS`` tokens between what the template puts before and behind it.
    """
    if files.chat_template is None:
        return _none("the model has no chat template")
    try:
        rows = [_encode(files, files.chat_template, passage) for passage in _passages(text)]
        other = _encode(files, files.chat_template, "?")
    except (UsageError, MissingDependency) as error:
        return _none(error.message)
    begin = () if files.bos_token_id is None or rows[0][:1] != [files.bos_token_id] else (files.bos_token_id,)
    rows = [row[len(begin) :] for row in rows]
    alike = [*rows, other[len(begin) :]]
    before = _common(alike)
    behind = min(_common([row[::-1] for row in alike]), *(len(row) - before for row in alike))
    message = min(MESSAGE_TOKENS, *(len(row) - before - behind for row in rows))
    if before + message + behind < 2:
        return _none("the chat template makes no prompt of two tokens")
    prompts = [row[: before + message] + row[len(row) - behind :] for row in rows]
    return ChatPrompts(np.array(prompts, dtype=np.int64), begin, files.eos_token_ids)


def _none(reason: str) -> ChatPrompts:
    return ChatPrompts(np.zeros((0, 0), dtype=np.int64), missing=reason)


def _passages(text: str) -> list[str]:
    """Return the begin of up to ``PROMPTS`` paragraphs, spread evenly over a text; of all of it if they are short."""
    paragraphs = [p.strip()[:PASSAGE] for p in text.split("\n\n")]
    found = [p for p in paragraphs if len(p) >= PASSAGE // 2] or [text.strip()[:PASSAGE]]
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, min(PROMPTS, len(found))).astype(int))]


def _encode(files: TextFiles, template: ChatTemplate, message: str) -> list[int]:
    rendered = template.render([{"role": "user", "content": message}], strftime_now=TODAY.strftime)
    return encode_chat(files.tokenizer, rendered, files.bos_token_id)


def _common(rows: list[list[int]]) -> int:
    """Return the length of the common beginning."""
    count = 0
    for tokens in zip(*rows, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count
