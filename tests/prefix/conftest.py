"""An oracle for what the search measures: site inputs from a plain transformers run, errors in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from cushion_deploy.modeling.runner import TorchRunner

Oracle = Callable[..., dict[str, float]]


def site_inputs(model: TorchRunner, ids: Sequence[int]) -> dict[str, np.ndarray]:
    """Return what enters every linear but the head, float64 ``[length, features]``, without cache or hooks of ours."""
    found: dict[str, np.ndarray] = {}
    handles = [
        linears[0].register_forward_hook(
            lambda _, args, __, site=site: found.__setitem__(site, args[0][0].double().numpy())
        )
        for site, linears in model.sites.items()
        if site != "head"
    ]
    with torch.inference_mode():
        model.module(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def measure(model: TorchRunner, before: Sequence[int], text: Sequence[int], bits: int = 8) -> dict[str, float]:
    """Return both objectives of ``text`` behind the tokens ``before``, for codes of ``bits`` bits."""
    limit = 2 ** (bits - 1) - 1
    total, largest = 0.0, 0.0
    for x in site_inputs(model, [*before, *text]).values():
        x = x[len(before) :]
        step = np.abs(x).max() / limit
        total += ((x - np.clip(np.rint(x / step), -limit - 1, limit) * step) ** 2).sum()
        largest = max(largest, np.abs(x).max())
    return {"error": float(total), "max": float(largest)}


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """Return :func:`measure`."""
    return measure


@pytest.fixture(scope="session")
def inputs_of() -> Callable[[TorchRunner, Sequence[int]], dict[str, np.ndarray]]:
    """Return :func:`site_inputs`."""
    return site_inputs
