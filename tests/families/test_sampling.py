"""Text drawn from a model of any family is what transformers' own growing cache gives with the same random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.modeling import sample

ROWS, TOKENS, SEED = 3, 30, 5
"""More tokens than the window of the sliding layers, 12."""


def drawn(module: Any, bos: tuple[int, ...]) -> np.ndarray:
    """Return ids int64 ``[ROWS, TOKENS]`` drawn with torch.multinomial from transformers' module as it comes."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(module.config.vocab_size, (ROWS, 1), generator=generator)
    rows, cache, new = [ids[:, 0].numpy()], None, torch.cat([torch.tensor([bos] * ROWS, dtype=torch.int64), ids], dim=1)
    while len(rows) < TOKENS:
        with torch.inference_mode():
            output = module(input_ids=new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        new = torch.multinomial(torch.softmax(output.logits[:, -1], dim=-1), 1, generator=generator)
        rows.append(new[:, 0].numpy())
    return np.stack(rows, axis=1)


def test_the_tokens_are_those_of_a_growing_cache(
    variant: str, load_variant: Any, oracle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_variant(variant)
    monkeypatch.setattr(sample, "SAMPLES", ROWS)
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", TOKENS)
    found: list[torch.Tensor] = []
    monkeypatch.setattr(model.tokenizer, "batch_decode", lambda ids, **_: found.append(ids) or ["text"] * len(ids))
    sample.sample_text(model, SEED)
    np.testing.assert_array_equal(found[0].numpy(), drawn(oracle(variant), model.bare_tokens))
