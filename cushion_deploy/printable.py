"""Text made safe to display: whitespace, control and direction characters are replaced by visible symbols."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

# Common fonts have these symbols; few have the control pictures of U+2400.
_SYMBOLS = {"\n": "⏎", " ": "␣", "\t": "⇥"}
_DIRECTION = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}


class Piece(NamedTuple):
    """A run of token text; ``is_symbol`` marks a symbol that replaces an invisible character."""

    text: str
    is_symbol: bool


def token_pieces(token: str) -> list[Piece]:
    """Split a token into literal text and symbols for whitespace, control and direction characters."""
    if not token:
        return [Piece("(empty)", True)]
    pieces: list[Piece] = []
    for char in token:
        symbol = _symbol(char)
        if symbol is None and pieces and not pieces[-1].is_symbol:
            pieces[-1] = Piece(pieces[-1].text + char, False)
        else:
            pieces.append(Piece(char, False) if symbol is None else Piece(symbol, True))
    return pieces


def visible(token: str) -> str:
    r"""Return a token with every invisible character replaced: ``"\n a"`` becomes ``"⏎␣a"``."""
    return "".join(piece.text for piece in token_pieces(token))


def one_line(text: str) -> str:
    """Return text on one line that cannot move a terminal's cursor or change the text direction."""
    return "".join(" " if char in " \n\t" else _symbol(char) or char for char in text)


def legible(text: str) -> str:
    """Return text of any number of lines without control and direction characters that could disguise it."""
    # Python calls exactly the categories of `_INVISIBLE` not printable, except for the space.
    if text.replace("\n", " ").replace("\u00a0", " ").isprintable():
        return text
    return "".join(char if char in "\n \u00a0" else _symbol(char) or char for char in text)


def controls_visible(text: str) -> str:
    """Return text of any number of lines that cannot control a terminal or change the direction of text.

    Joiners and other invisible characters, which scripts and emoji need, stay.
    """
    return "".join(_symbol(char) or char if _is_control(char) else char for char in text)


def _is_control(char: str) -> bool:
    return char in _DIRECTION or (char not in "\n\t" and unicodedata.category(char) in ("Cc", "Cs"))


def _symbol(char: str) -> str | None:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if unicodedata.category(char) in _INVISIBLE:
        return f"‹U+{ord(char):04X}›"
    return None
