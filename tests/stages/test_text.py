"""Conversations as calibration text: what transformers renders, without <bos>; errors that name file and row."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.calib.corpora import load_rows
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.recipe import Recipe
from cushion_deploy.runtime.chat import ChatTemplate
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.text import render_rows
from cushion_deploy.store import StageStore

CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": " Who? "}, {"role": "assistant", "content": "I\n"}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 中文"}]},
    {"messages": [{"role": "user", "content": "call"}], "tools": [{"name": "add", "parameters": {"x": "number"}}]},
]
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}{{ strftime_now('%Y') if false }}"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return path


def rendered(tokenizer: Any, row: dict[str, Any]) -> str:
    """Return a conversation as transformers renders it, without the beginning-of-sequence token."""
    text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
    return str(text).removeprefix(tokenizer.bos_token)


def test_a_pipeline_reads_conversations_as_transformers_renders_them(
    tiny_folder: Path, tiny_model: TorchRunner, file: Path, tmp_path: Path
) -> None:
    recipe = Recipe().merged({"model": str(tiny_folder), "calibration.data": str(file)})
    pipeline, run = Pipeline.of(recipe), Run(StageStore(tmp_path / "work"))
    corpus = run.get(pipeline.text)
    assert corpus.documents == tuple(rendered(tiny_model.tokenizer, row) for row in CHATS)
    assert corpus.text == "".join(corpus.documents), "a template ends each conversation itself"
    # The tokens are those of transformers, too: special tokens in the text are one token each.
    theirs = tiny_model.tokenizer.apply_chat_template(CHATS[0]["messages"], return_dict=False)
    assert tiny_model.encode(corpus.documents[0]).tolist() == theirs
    assert corpus.prose == " Who? \n\nGrüße, 中文\n\ncall"


def test_the_beginning_of_sequence_token_is_left_out_and_tools_are_rendered(tiny_folder: Path, file: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    template = ChatTemplate(TEMPLATE, tokenizer.special_tokens_map)
    corpus = render_rows(load_rows(str(file), "calibration"), template)
    assert corpus.documents == tuple(rendered(tokenizer, row) for row in CHATS)
    assert "<tools>" in corpus.documents[2]
    assert not any(document.startswith("<s>") for document in corpus.documents)


def test_a_text_with_dates_is_the_same_every_day(file: Path) -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    first = render_rows(load_rows(str(file), "calibration"), template).documents[0]
    assert first == f"{datetime(2025, 1, 1):%d %b %Y}  Who? "


def test_a_model_without_a_template_cannot_read_conversations(file: Path) -> None:
    with pytest.raises(UsageError, match=r"chats\.jsonl, line 1 is a conversation.*no chat template"):
        render_rows(load_rows(str(file), "calibration"), None)


def test_a_conversation_that_the_template_rejects_is_named(file: Path) -> None:
    template = ChatTemplate("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    with pytest.raises(UsageError, match=r"chats\.jsonl, line 2: .*no system"):
        render_rows(load_rows(str(file), "calibration"), template)


def test_text_beside_conversations_keeps_its_blank_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    corpus = render_rows(
        load_rows(str(tmp_path / "a.jsonl"), "calibration"), ChatTemplate("[{{ messages[0].content }}]")
    )
    assert corpus.text == "one\n\n[two]"
