"""Where candidates come from: the screen's top, obvious tokens, and a random sample."""

from __future__ import annotations

from typing import Literal

import numpy as np

from cushion_deploy.modeling.load import LoadedModel
from cushion_deploy.types import FloatArray

Source = Literal["obvious", "screen", "random", "scan"]
OBVIOUS = ("\n", "\n\n", " ", "  ", ".", ",", ":", ";", "-", "\t", "the", " the", " and", *"0123456789")


def gather_candidates(
    model: LoadedModel, sizes: FloatArray, screen: int, random: int, rng: np.random.Generator
) -> dict[int, Source]:
    """Return token ids with the source that named them first.

    Args:
        model: whose vocabulary and tokenizer are meant.
        sizes: the screen's result, float32 ``[vocab]``.
        screen: how many of the largest to take.
        random: how many uniformly random tokens to take.
        rng: source of randomness.
    """
    found: dict[int, Source] = dict.fromkeys(obvious_tokens(model), "obvious")
    for token in np.argsort(-sizes, kind="stable")[:screen]:
        found.setdefault(int(token), "screen")
    for token in rng.choice(len(sizes), size=min(random, len(sizes)), replace=False):
        found.setdefault(int(token), "random")
    return found


def obvious_tokens(model: LoadedModel) -> list[int]:
    """Return the special tokens and the single tokens of common separators and digits, in a fixed order."""
    tokenizer = model.tokenizer
    special = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    encoded = [model.encode(text) for text in OBVIOUS]
    single = [int(ids[0]) for ids in encoded if len(ids) == 1]
    return [i for i in dict.fromkeys([*special, *single]) if 0 <= i < model.spec.vocab_size]
