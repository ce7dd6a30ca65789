"""Tokens as the API reports them: text and UTF-8 bytes, also of a token that is only part of a character."""

from __future__ import annotations

import codecs
import json
import re

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level vocabularies (GPT-2's ``bytes_to_unicode``, inverted)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenText:
    """Text and bytes of single tokens.

    Args:
        tokenizer: tokenizer of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Read from the tokenizer's decoder how its vocabulary writes bytes."""
        self._tokenizer = tokenizer
        state = json.loads(tokenizer.to_str())
        self._special = {int(t["id"]) for t in state.get("added_tokens", [])}
        text = json.dumps(state.get("decoder"))
        self._byte_level = '"ByteLevel"' in text
        self._fallback = '"ByteFallback"' in text
        self._alphabet = _byte_level_alphabet()

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._special:
            return str(token).encode()
        if self._byte_level:
            return bytes(b for c in token for b in ([self._alphabet[c]] if c in self._alphabet else c.encode()))
        if self._fallback and (found := _BYTE.fullmatch(token)):
            return bytes([int(found[1], 16)])
        return str(token).replace("\u2581", " ").encode()

    def is_special(self, token_id: int) -> bool:
        """Return whether a token is no part of a text, as the end of it."""
        return token_id in self._special

    def text_of(self, token_id: int) -> str:
        """Return the text of a token; bytes that are no whole character are written as hexadecimal escapes."""
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{b:02x}" for b in raw)


class TextOffsets:
    """Where the tokens of an answer begin in its text, in characters; a part of a character begins where that does.

    Args:
        tokens: the vocabulary.
    """

    def __init__(self, tokens: TokenText) -> None:
        """Start at the beginning of an answer."""
        self._tokens, self._offset = tokens, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token_id: int) -> int:
        """Return the offset of the next token."""
        offset = self._offset
        if not self._tokens.is_special(token_id):
            self._offset += len(self._decoder.decode(self._tokens.bytes_of(token_id)))
        return offset
