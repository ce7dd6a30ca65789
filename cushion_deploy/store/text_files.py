"""Text from files and pipes: UTF-8, with or without a byte order mark; anything else is an error with its offset."""

from __future__ import annotations

import codecs
from pathlib import Path

from cushion_deploy.errors import UsageError

_HINT = "convert it to UTF-8, for example with `iconv -f {} -t UTF-8`"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_utf8(data: bytes, name: str, *, offset: int = 0) -> str:
    """Return the text of UTF-8 bytes, without the byte order mark that editors of Windows put first.

    Args:
        data: the bytes.
        name: where they come from, for the error.
        offset: of ``data`` in what has that name; a byte order mark is removed only at 0.

    Raises:
        UsageError: they are not UTF-8; the message has the first wrong byte and its offset.
    """
    if not offset:
        for mark, encoding in _MARKS.items():
            if data.startswith(mark):
                raise UsageError(
                    f"{name} is {encoding} text: it begins with the byte order mark {mark.hex(' ')}, expected UTF-8",
                    hint=_HINT.format(encoding),
                )
    skipped = len(codecs.BOM_UTF8) if not offset and data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[skipped:].decode("utf-8")
    except UnicodeDecodeError as e:
        at = skipped + e.start
        raise UsageError(
            f"{name} is not UTF-8 text: byte 0x{data[at]:02x} at offset {offset + at} ({e.reason})",
            hint=_HINT.format("WINDOWS-1252"),
        ) from e


def read_utf8(path: Path) -> str:
    """Return the text of a file, whose line ends stay as they are.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}", hint="give a text file that you may read") from e
    return decode_utf8(data, str(path))
