"""Sources of candidates: obvious tokens, the top of each screen, and a random sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.modeling.runner import TorchRunner

Source = Literal["obvious", "self-sink", "gradient", "random", "scan"]
Candidates = dict[int, tuple[Source, ...]]
"""Token id to every source that proposed it."""
OBVIOUS = ("\n", "\n\n", " ", "  ", ".", ",", ":", ";", "-", "\t", "the", " the", " and", *"0123456789")


def gather_candidates(
    model: TorchRunner, screen: Iterable[int], gradient: Iterable[int], random: int, rng: np.random.Generator
) -> Candidates:
    """Return token ids, each once, with all sources that proposed it.

    Args:
        model: the model, for its vocabulary and tokenizer.
        screen: tokens that the self-sink screen proposes.
        gradient: tokens that the gradient screen proposes.
        random: number of uniformly random tokens to add.
        rng: source of randomness.
    """
    vocabulary = model.vocabulary
    named: dict[Source, Iterable[int]] = {
        "obvious": obvious_tokens(model),
        "self-sink": screen,
        "gradient": gradient,
        "random": (int(t) for t in rng.choice(vocabulary, size=min(random, len(vocabulary)), replace=False)),
    }
    found: Candidates = {}
    for source, tokens in named.items():
        for token in tokens:
            found[token] = (*found.get(token, ()), source)
    return found


def largest(values: FloatArray, count: int) -> list[int]:
    """Return the ids of the ``count`` largest values of float32 ``[vocab]``, largest first."""
    return [int(token) for token in np.argsort(-values, kind="stable")[:count]]


def count_sources(candidates: Mapping[int, tuple[Source, ...]], tokens: Collection[int]) -> dict[str, int]:
    """Return how many of ``tokens`` each source proposed; a token with several sources counts for each."""
    return dict(Counter(source for token in tokens for source in candidates[token]))


def obvious_tokens(model: TorchRunner) -> list[int]:
    """Return special tokens, and common separators and digits that are single tokens, in a fixed order."""
    tokenizer = model.tokenizer
    special = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    encoded = [model.encode(text) for text in OBVIOUS]
    single = [int(ids[0]) for ids in encoded if len(ids) == 1]
    return [i for i in dict.fromkeys([*special, *single]) if 0 <= i < model.spec.vocab_size]
