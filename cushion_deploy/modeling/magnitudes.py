"""Largest and median activation magnitudes of each layer (Figure 2 of the paper)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.runner import TorchRunner


@torch.inference_mode()
def layer_magnitudes(model: TorchRunner, prefix: Prefix, ids: IntArray) -> list[dict[str, float]]:
    """Return the three largest magnitudes and the median of each layer's output over text tokens int64 ``[1, n]``."""
    found: list[dict[str, float]] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        values = hidden.abs().flatten()
        top = values.topk(3).values.tolist()
        found.append(
            {"layer": len(found), **{f"top{i + 1}": v for i, v in enumerate(top)}, "median": float(values.median())}
        )

    with ExitStack() as stack:
        for layer in model.layers:
            stack.callback(layer.register_forward_hook(hook).remove)
        model.sweep(model.batches(ids, None, len(ids)), model.past(prefix))
    return found
