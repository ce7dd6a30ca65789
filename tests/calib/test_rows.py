"""Rows of data sets: text or a conversation each; whatever else a row holds is an error that names file and row."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cushion_deploy.calib.corpora import load_corpus, load_rows
from cushion_deploy.errors import UsageError

ASKED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHARED = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]


def write(path: Path, *rows: Any) -> str:
    """Write rows as JSON Lines or parquet, by the suffix."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "'text' is null"),
        (5, "'text' is the number 5"),
        (2.5, "'text' is the number 2.5"),
        (True, "'text' is true"),
        (["a", "b"], "'text' is a list"),
        ({"a": 1}, "'text' is an object"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_that_is_none_is_never_turned_into_words(tmp_path: Path, suffix: str, value: Any, found: str) -> None:
    first = [{"text": "one"}] if suffix == ".jsonl" or value is None else []
    file = write(tmp_path / f"a{suffix}", *first, {"text": value})
    row = f"a{suffix}, {'line' if suffix == '.jsonl' else 'row'} {len(first) + 1}: "
    with pytest.raises(UsageError) as e:
        load_corpus(file, "calibration")
    assert e.value.message == f"{row}{found}, expected text"
    assert "'messages'" in e.value.hint


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "a", "answer": "b"}, "the fields are 'answer', 'prompt'"),
        ({}, "the fields are none"),
        ([1], "found a list, expected an object"),
        ({"text": "\ud800"}, "half a character, U+D800"),
        ({"messages": "hello"}, "'messages' is text, expected a list"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": ["hello"]}, "message 1 is text, expected an object"),
        ({"messages": [*ASKED, {"content": "x"}]}, "'role' of message 3 is null"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1 is from 'alien', expected one of human"),
        ({"conversations": [{"from": "human", "value": 3}]}, "'value' of message 1 is the number 3"),
        ({"messages": ASKED, "tools": "none"}, "'tools' is text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "'content' of message 1 has half a character, U+D800"),
        ({"messages": [{"role": "user", "content": [{"text": "\ud800"}]}]}, "'text' of message 1 has half a character"),
        ({"messages": [{"role": "user", "content": "x", "a": float("nan")}]}, "'a' of message 1 is the number nan"),
        ({"messages": ASKED, "tools": [{"name": "\udfff"}]}, "'name' of 'tools' has half a character, U+DFFF"),
    ],
)
def test_a_row_that_holds_no_document_is_named(tmp_path: Path, row: Any, found: str) -> None:
    with pytest.raises(UsageError, match=r"a\.jsonl, line 2: ") as e:
        load_rows(write(tmp_path / "a.jsonl", {"text": "one"}, row), "calibration")
    assert found in e.value.message


def test_a_message_of_a_table_with_a_date_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"messages": [{**ASKED[0], "at": datetime(2025, 1, 1)}]})
    with pytest.raises(
        UsageError, match=r"a\.parquet, row 1: 'at' of message 1 is datetime\.datetime\(2025, 1, 1.*JSON"
    ):
        load_rows(file, "calibration")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_of_both_forms_are_the_same_messages(tmp_path: Path, suffix: str) -> None:
    own = load_rows(write(tmp_path / f"a{suffix}", {"messages": ASKED}), "calibration")
    shared = load_rows(write(tmp_path / f"b{suffix}", {"conversations": SHARED}), "calibration")
    assert [list(chat.messages) for chat in own.chats] == [ASKED]
    assert own.digest == shared.digest
    assert own.digest != load_rows(write(tmp_path / f"c{suffix}", {"text": json.dumps(ASKED)}), "calibration").digest


def test_the_system_message_of_sharegpt_comes_first(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"conversations": SHARED, "system": "Be brief."})
    assert load_rows(file, "calibration").chats[0].messages[0] == {"role": "system", "content": "Be brief."}


def test_keys_that_a_table_fills_with_null_are_absent(tmp_path: Path) -> None:
    calls = [{"name": "add"}]
    rows = {"messages": [ASKED[0], {"role": "assistant", "content": None, "tool_calls": calls}]}
    found = load_rows(write(tmp_path / "a.parquet", rows), "calibration").chats[0].messages
    assert found == (ASKED[0], {"role": "assistant", "content": None, "tool_calls": calls})


def test_a_conversation_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.jsonl, line 1 is a conversation"):
        load_corpus(write(tmp_path / "a.jsonl", {"messages": ASKED}), "evaluation")
