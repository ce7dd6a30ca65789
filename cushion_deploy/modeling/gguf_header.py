"""The first metadata of a GGUF file, without reading its vocabulary: the gguf library takes seconds for that."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 16
"""Bytes of a string, and elements of an array, beyond which a file is not read on."""


def general_fields(path: Path) -> dict[str, Any]:
    """Return the fields that begin with ``general.``, which writers put first, up to the first other field.

    The layout is that of the GGUF specification, version 2 and 3, little-endian. What comes behind something that
    cannot be read is left out.
    """
    found: dict[str, Any] = {}
    try:
        with open(path, "rb") as file:
            magic, version = file.read(4), _number(file, 4)
            _number(file, 10)  # tensors
            count = _number(file, 10)
            if magic != b"GGUF" or version not in (2, 3):
                return found
            for _ in range(count):
                key = _string(file)
                if not key.startswith("general."):
                    break
                found[key] = _value(file, _number(file, 4))
    except (ValueError, KeyError, OSError, struct.error):
        pass  # a card without an origin is better than no bundle: whoever reads the weights reports a damaged file
    return found


def _number(file: BinaryIO, kind: int) -> Any:
    layout = "<" + _FORMATS[kind]
    return struct.unpack(layout, file.read(struct.calcsize(layout)))[0]


def _length(file: BinaryIO) -> int:
    count = int(_number(file, 10))
    if count > _LONGEST:
        raise ValueError(f"{count} bytes or elements")
    return count


def _string(file: BinaryIO) -> str:
    return file.read(_length(file)).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        element = _number(file, 4)
        if element == _ARRAY:
            raise ValueError("an array of arrays")
        return [_value(file, element) for _ in range(_length(file))]
    return _number(file, kind)
