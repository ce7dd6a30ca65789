"""An oracle for what the search measures: site inputs from a plain transformers run, errors in numpy; small tunings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix.tune import PrefixTuning
from cushion_deploy.recipe import Tuning

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


@pytest.fixture
def tuning(planted_model: TorchRunner, plain_ids: IntArray) -> Callable[..., PrefixTuning]:
    """Return a maker of small tunings of the token 97, with the same scale at every Site."""

    def make(
        scratch: Path | None = None,
        *,
        tokens: tuple[int, ...] = (97,),
        window: int = 16,
        scale: float = 0.02,
        head: bool = False,
        **config: Any,
    ) -> PrefixTuning:
        small: dict[str, Any] = {"epochs": 2, "batch": 2, "judge_every": 2, "checkpointing": False}
        prefix = planted_model.compute_prefix(tokens)
        windows = plain_ids[: 8 * window].reshape(8, window)
        settings = Tuning(**{**small, "learning_rate": 0.001, **config})
        lineage = Lineage(planted_model.spec.weights_digest, prefix.digest, text="c")
        scales = ActivationScales(dict.fromkeys(planted_model.sites, float(np.float32(scale))), "max", lineage, 1)
        quantization = Quantization(prefix, QuantScheme(quantize_head=head), scales)
        return PrefixTuning(planted_model, quantization, windows[:6], windows[6:], settings, 7, scratch)

    return make
