"""Fold a smoothing into a loaded model."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.core.weights import whole
from cushion_deploy.families.folding import FoldedWeights
from cushion_deploy.modeling.load import LoadedModel


def fold(model: LoadedModel, smoothing: Smoothing) -> LoadedModel:
    """Return the same function with the factors folded in; tensors that no factor touches are shared with ``model``.

    The spec keeps its digest: a folded model is the same model, written differently, and its prefix fits both.
    """
    weights = FoldedWeights(model.weights, model.family, model.spec, smoothing)
    memo = {id(p): p for p in model.module.parameters()}
    module = copy.deepcopy(model.module, memo)
    for name in sorted(weights.touched):
        owner, _, attribute = name.rpartition(".")
        folded = torch.from_numpy(whole(weights, name))
        setattr(module.get_submodule(owner), attribute, nn.Parameter(folded, requires_grad=False))
    paths = model.family.linears(model.spec, head=True)
    sites = {site: tuple(module.get_submodule(path) for path in paths[site]) for site in model.sites}
    return replace(model, module=module, sites=sites, smoothing=smoothing)
