"""Activation magnitudes per layer, the paper's Figure 2."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.forward import prefix_tensors, run
from cushion_deploy.modeling.load import LoadedModel


@torch.inference_mode()
def layer_magnitudes(model: LoadedModel, prefix: Prefix, ids: IntArray) -> list[dict[str, float]]:
    """Return top-1, top-2, top-3 and median magnitude of each layer's output over text tokens int64 ``[1, n]``."""
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
        run(model, torch.from_numpy(ids), prefix_tensors(prefix), head=False)
    return found
