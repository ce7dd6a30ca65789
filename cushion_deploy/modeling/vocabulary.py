"""The tokens that a text can become: rows of an embedding beyond them are padding, and were never trained."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import IntArray

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def producible_tokens(tokenizer: Any, rows: int) -> IntArray:
    """Return the ids below ``rows`` that some text is encoded to, ascending, int64 ``[n]``.

    Embeddings are padded to a round number of rows. Some tokenizers have names for those, such as ``[PAD151666]`` in
    GGUF files, which no text is encoded to either: byte pair encoding only makes single characters, bytes, what merges
    say, and added tokens.

    Args:
        tokenizer: the transformers tokenizer.
        rows: rows of the embedding.
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    made = _made_by_merges(tokenizer)
    if made is not None:
        added = tokenizer.get_added_vocab()
        ids = {t: i for t, i in ids.items() if len(t) == 1 or t in made or t in added or _BYTE.fullmatch(t)}
    return np.array(sorted({i for i in ids.values() if 0 <= i < rows}), dtype=np.int64)


def _made_by_merges(tokenizer: Any) -> frozenset[str] | None:
    """Return the results of all merges; None if the tokenizer finds tokens in another way too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    model = json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges") or model.get("continuing_subword_prefix"):
        return None
    if model.get("end_of_word_suffix"):
        return None
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    return frozenset("".join(pair) for pair in pairs)
