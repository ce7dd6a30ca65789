"""The rounding noise of a model: how far its logits in float32 are from those of float64 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.runner import TorchRunner

SAMPLE_TOKENS = 64
NARROW = (torch.float32, torch.float16, torch.bfloat16)


class Float64Arithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run every operator of PyTorch in float64 that would run in fewer bits, casts included.

    Weights are widened one operator at a time, so that the model does not have to fit into memory twice.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func`` with every floating-point tensor and ``dtype`` replaced by float64.

        A view of the same bytes as another type computes nothing: weights that are read from a file are made that way.
        """
        if func is torch.ops.aten.view.dtype:
            return func(*args, **(kwargs or {}))
        return func(*tree_map(_wide, args), **tree_map(_wide, kwargs or {}))


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in NARROW else value
    return value.double() if isinstance(value, Tensor) and value.dtype in NARROW else value


@torch.no_grad()  # In inference mode, float64 views of what was made before it raise an error.
def float_noise(model: TorchRunner, prefix: Prefix, ids: IntArray) -> float:
    """Return the largest difference of logits between float32 and float64 arithmetic on the beginning of a text.

    It is at least the distance between neighbouring float32 numbers at the largest logit.

    Args:
        model: the model in float32, or a type that float64 replaces likewise.
        prefix: precedes the text.
        ids: int64 ``[1, n]``; the first :data:`SAMPLE_TOKENS` are run.
    """
    sample = ids[:, :SAMPLE_TOKENS]
    single = model.logits(sample, prefix).astype(np.float64)
    # mps has no float64.
    with nullcontext() if model.wide == torch.float64 else model.placed.on_cpu():
        tokens, past = model.tensor(sample), model.past(prefix)
        with Float64Arithmetic():  # type: ignore[no-untyped-call]
            double = model.array(model.run(tokens, past).logits)
    ulp = float(np.finfo(np.float32).eps) * float(np.abs(single).max())
    return max(float(np.abs(single - double).max()), ulp)
