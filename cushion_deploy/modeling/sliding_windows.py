"""Attention masks of models with sliding windows in which a prefix stays in sight."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask


def masks_keeping(
    kept: int, windows: tuple[int, ...], config: Any, like: Tensor, padding: Tensor | None, cache: Cache
) -> Tensor | dict[str, Tensor | None]:
    """Return the masks of one pass in which the first ``kept`` positions are seen from everywhere behind them.

    They are what a model makes for itself from its configuration, with the prefix as the only difference.

    Args:
        kept: number of positions, from the first of the cache on.
        windows: window of each layer, 0 for none.
        config: of the model.
        like: any tensor ``[batch, length, ...]`` with the device and the type of the hidden states.
        padding: int64 ``[batch, cached + length]``, 0 on padding; None if nothing is padded.
        cache: as it is before the pass.

    Returns:
        What a model takes as ``attention_mask`` in place of a padding mask: one mask for all layers if all have the
        window, else one for each kind of layer.
    """
    common = {"config": config, "inputs_embeds": like, "attention_mask": padding, "past_key_values": cache}
    # Causality is repeated because the union with the model's own mask would end it for the kept positions themselves.
    sliding: Tensor = create_sliding_window_causal_mask(
        **common, or_mask_function=lambda batch, head, query, key: (key < kept) & (key <= query)
    )
    if all(windows):
        return sliding
    return {"full_attention": create_causal_mask(**common), "sliding_attention": sliding}
