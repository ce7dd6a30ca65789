"""Numbers formatted for people: percentages, sizes, durations, counts; and small helpers for English text."""

from __future__ import annotations

from datetime import datetime
from pathlib import PurePosixPath

from cushion_deploy.printable import one_line

NONE = "—"
NOT_FINITE = "not finite"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def model_name(source: str) -> str:
    """Return the last part of a hub id or path: ``HuggingFaceTB/SmolLM2-135M`` gives ``SmolLM2-135M``."""
    return one_line(PurePosixPath(source.replace("\\", "/")).name or source)


def percent(ratio: float) -> str:
    """Return a signed change: 0.0934 gives ``+9.3 %``, 1.136 gives ``+114 %``, -0.0004 gives ``−0.04 %``."""
    value = 100 * ratio
    size = abs(value)
    return signed(value, 0 if size >= 99.95 else 1 if size >= 0.95 else 2) + " %"


def signed(value: float, digits: int = 2) -> str:
    """Return a number with its sign and a fixed number of decimals; what rounds to zero has no sign and two."""
    text = f"{abs(value):,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return "0.00"
    return ("−" if value < 0 else "+") + text


def number(value: float | None, digits: int = 6) -> str:
    """Return a number with up to ``digits`` significant digits; None gives ``not finite``."""
    if value is None:
        return NOT_FINITE
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return f"{float(text):,}" if abs(value) >= 1000 else text


def perplexity(value: float | None) -> str:
    """Return a perplexity with two decimals; None gives ``—``."""
    return NONE if value is None else f"{value:,.2f}"


def with_error(value: float | None, stderr: float | None, digits: int = 2) -> str:
    """Return a value with its standard error, ``17.32 ± 0.71``; None gives ``—``, an unknown error is left out."""
    if value is None:
        return NONE
    return f"{value:,.{digits}f}" + ("" if stderr is None else f" ± {stderr:,.{digits}f}")


def excerpt(scored: int, window: int, text_tokens: int | None) -> str:
    """Return ``first 4,096 of 68,011 tokens`` if not all windows of a text were scored, otherwise an empty string.

    Args:
        scored: number of scored tokens, one fewer than ``window`` in every window.
        window: tokens per window.
        text_tokens: tokens of the whole text; None if they are not known.
    """
    read = scored // max(window - 1, 1) * window
    if text_tokens is None or text_tokens - read < window:
        return ""
    return f"first {read:,} of {text_tokens:,} tokens"


def extent(scored: int, window: int, text_tokens: int | None) -> str:
    """Return how much of a text was scored: :func:`excerpt`, ``all 341,469 tokens``, or the number of scored tokens."""
    if text_tokens is None:
        return plural(scored, "token")
    return excerpt(scored, window, text_tokens) or f"all {plural(text_tokens, 'token')}"


def value_and_limit(value: float | None, limit: float) -> tuple[str, str]:
    """Return both numbers with enough digits to tell them apart when they differ."""
    for digits in (6, 9, 17):
        pair = number(value, digits), number(limit, digits)
        if value == limit or pair[0] != pair[1]:
            return pair
    return repr(value), repr(limit)


def size(count: int) -> str:
    """Return a number of bytes in decimal units: 163_000_000 gives ``163 MB``."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 999.5 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.95 else f"{amount:.1f} {unit}"


def count(value: int) -> str:
    """Return a large count in millions or billions: 134_515_008 gives ``134.5 million``."""
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


def date_time(moment: datetime) -> str:
    """Return a date and time with its zone: ``2026-03-14 09:26 UTC``."""
    return moment.strftime("%Y-%m-%d %H:%M %Z").strip()


def plural(amount: int, noun: str) -> str:
    """Return ``1 token`` or ``2 tokens``."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def listing(items: list[str]) -> str:
    """Return ``a``, ``a and b`` or ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
