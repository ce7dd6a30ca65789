"""Words and numbers as people read them: percentages, sizes, durations, and tokens with visible whitespace."""

from __future__ import annotations

import unicodedata
from pathlib import PurePosixPath
from typing import NamedTuple

# The symbols are ones that common fonts have; the control pictures of U+2400 are in few.
_SYMBOLS = {"\n": "⏎", " ": "␣", "\t": "⇥"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}


class Piece(NamedTuple):
    """A run of token text; ``stands_in`` marks a symbol that replaces an invisible character."""

    text: str
    stands_in: bool


def token_pieces(token: str) -> list[Piece]:
    """Split a token into literal text and symbols for whitespace, controls and direction marks."""
    if not token:
        return [Piece("(empty)", True)]
    pieces: list[Piece] = []
    for char in token:
        symbol = _stand_in(char)
        if symbol is None and pieces and not pieces[-1].stands_in:
            pieces[-1] = Piece(pieces[-1].text + char, False)
        else:
            pieces.append(Piece(char, False) if symbol is None else Piece(symbol, True))
    return pieces


def visible(token: str) -> str:
    r"""Return a token with nothing invisible left in it: ``"\n a"`` becomes ``"⏎␣a"``."""
    return "".join(piece.text for piece in token_pieces(token))


def one_line(text: str) -> str:
    """Return text that cannot move a terminal's cursor or change its direction: only plain spaces stay."""
    return "".join(" " if char in " \n\t" else _stand_in(char) or char for char in text)


def legible(text: str) -> str:
    """Return text of any number of lines without controls and direction marks that could disguise it."""
    return "".join(char if char in "\n \u00a0" else _stand_in(char) or char for char in text)


def _stand_in(char: str) -> str | None:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if unicodedata.category(char) in _INVISIBLE:
        return f"‹U+{ord(char):04X}›"
    return None


def model_name(source: str) -> str:
    """Return the last part of a hub id or path: ``HuggingFaceTB/SmolLM2-135M`` is ``SmolLM2-135M``."""
    return one_line(PurePosixPath(source.replace("\\", "/")).name or source)


def percent(ratio: float) -> str:
    """Return a change with its sign: 0.0934 is ``+9.3 %``, 1.136 is ``+114 %``, -0.0004 is ``−0.04 %``."""
    value = 100 * ratio
    size = abs(value)
    digits = 0 if size >= 99.95 else 1 if size >= 0.95 else 2
    text = f"{size:,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return "0.00 %"
    return f"{'−' if value < 0 else '+'}{text} %"


def number(value: float | None, digits: int = 6) -> str:
    """Return a number with up to ``digits`` significant digits; None reads ``not finite``."""
    if value is None:
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return f"{float(text):,}" if abs(value) >= 1000 else text


def perplexity(value: float | None) -> str:
    """Return a perplexity with two decimals; None reads ``—``."""
    return "—" if value is None else f"{value:,.2f}"


def value_and_limit(value: float | None, limit: float) -> tuple[str, str]:
    """Return both numbers with enough digits to tell them apart when they differ."""
    for digits in (6, 9, 17):
        pair = number(value, digits), number(limit, digits)
        if value == limit or pair[0] != pair[1]:
            return pair
    return repr(value), repr(limit)


def size(count: int) -> str:
    """Return bytes in decimal units: 163_000_000 is ``163 MB``."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"


def count(value: int) -> str:
    """Return a large count in words' scale: 134_515_008 is ``134.5 million``."""
    for limit, name in ((10**9, "billion"), (10**6, "million")):
        if value >= limit:
            return f"{value / limit:.1f} {name}"
    return f"{value:,}"


def duration(seconds: float) -> str:
    """Return a duration: ``0.4 s``, ``41 s``, ``2 min 5 s``, ``1 h 12 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def plural(amount: int, noun: str) -> str:
    """Return ``1 token`` or ``2 tokens``."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def listing(items: list[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
