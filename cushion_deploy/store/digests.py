"""Digests of values, which identify an artifact and its parents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt


def digest_json(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_arrays(arrays: Iterable[tuple[str, npt.NDArray[Any]]]) -> str:
    """Return the SHA-256 (hex) of named arrays: name, dtype, shape and bytes, in the given order."""
    h = hashlib.sha256()
    for name, array in arrays:
        h.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        h.update(np.ascontiguousarray(array).data)
    return h.hexdigest()
