"""Text of files: a byte order mark is no text, and what is not UTF-8 is named with its first wrong byte."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy.errors import UsageError
from cushion_deploy.store.text_files import decode_utf8, read_utf8


@settings(deadline=None, derandomize=True)
@given(st.text())
def test_a_byte_order_mark_is_no_part_of_the_text(text: str) -> None:
    assert decode_utf8(text.encode(), "a") == text.removeprefix("\ufeff")
    assert decode_utf8(codecs.BOM_UTF8 + text.encode(), "a") == text


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=20), st.sampled_from([*range(0x80, 0xC1), 0xFF]), st.booleans())
def test_the_first_wrong_byte_is_named_with_its_offset(text: str, wrong: int, marked: bool) -> None:
    before = codecs.BOM_UTF8 * marked + text.encode()
    with pytest.raises(UsageError, match=rf"a\.txt is not UTF-8 text: byte 0x{wrong:02x} at offset {len(before)} "):
        decode_utf8(before + bytes([wrong]) + b" and more", "a.txt")


def test_an_offset_counts_from_the_begin_of_what_is_named() -> None:
    with pytest.raises(UsageError, match="byte 0xe9 at offset 103"):
        decode_utf8(b"caf\xe9", "stdin", offset=100)
    assert decode_utf8(codecs.BOM_UTF8, "stdin", offset=100) == "\ufeff"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_another_unicode_encoding_is_named(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode(encoding))
    with pytest.raises(UsageError, match=f"{encoding.upper()} text") as e:
        read_utf8(tmp_path / "a.txt")
    assert f"iconv -f {encoding.upper()} -t UTF-8" in e.value.hint


def test_line_ends_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert read_utf8(tmp_path / "a.txt") == "a\r\nb\rc\n"
