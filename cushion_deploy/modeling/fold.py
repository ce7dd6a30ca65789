"""Fold a smoothing into the weights of a model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.core.weights import whole
from cushion_deploy.families.folding import FoldedWeights

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner


@torch.inference_mode(False)
def fold(model: TorchRunner, smoothing: Smoothing) -> TorchRunner:
    """Return a model that computes the same function with the factors folded in.

    Never in inference mode, whatever the caller is in: the folded model is kept, and tuning takes gradients through it.

    Tensors that no factor changes are shared with ``model``. The digest stays the same, because the folded model is the
    same model: a prefix of one fits the other.
    """
    weights = FoldedWeights(model.weights, model.family, model.spec, smoothing)
    memo = {id(p): p for p in model.module.parameters()}
    module = copy.deepcopy(model.module, memo)
    for name in sorted(weights.touched):
        owner, _, attribute = name.rpartition(".")
        folded = model.tensor(whole(weights, name)).to(model.dtype)
        setattr(module.get_submodule(owner), attribute, nn.Parameter(folded, requires_grad=False))
    paths = model.family.linears(model.spec, head=True)
    sites = {site: tuple(module.get_submodule(path) for path in paths[site]) for site in model.sites}
    return replace(model, module=module, sites=sites, smoothing=smoothing)
