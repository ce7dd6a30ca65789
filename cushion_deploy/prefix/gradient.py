"""Gradient screen: rank the vocabulary by the first-order change of a smooth stand-in for the objective.

One forward and backward pass with the candidate's slot as a free embedding e_0 tells, for every token v at once,
how the objective would change to first order if v stood there: (e_v - e_0) . gradient (HotFlip: Ebrahimi et al.,
2018; GCG: Zou et al., 2023). It is a filter like the self-sink screen: the exact objective decides.

round() has no useful gradient, so a Site's error is replaced by that of uniform rounding noise, n * scale^2 / 12.
The scale is amax / qmax, whose gradient would hang on a single element: amax is replaced by a p-norm over the text
tokens, which is scale-free and shares the gradient among all that are nearly as large.

e_0 is the mean embedding of the vocabulary. It belongs to no token, so no token is favoured for being near; and
behind it only that part of the error is left which the average token would not cure, so that the gradient points
to tokens that cure more than the average one. One start costs one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.fakequant import qmax
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.modeling.cache import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.observe import observed
from cushion_deploy.prefix.objective import Objective

NORM = 16
"""Order of the p-norm that stands for the largest magnitude; even, so that it is smooth at zero."""
TEXT_TOKENS = 128
"""Tokens of the step's text, from its beginning, that the gradient is taken on; bounds memory."""
CHUNK = 4096
"""Rows of the embedding matrix looked up at once."""


class SmoothObjective:
    """Accumulates the differentiable stand-in for the objective of one row over all Sites.

    ``error``: the sum over Sites of n * scale^2 / 12 with n elements and scale = ||X||_p / qmax; ``max``: the p-norm
    over the p-norms of all Sites. The first ``skip`` positions are no text and do not count.
    """

    def __init__(self, objective: Objective, skip: int, bits: int = 8) -> None:
        """Begin with no Site."""
        self.objective, self.skip, self.limit = objective, skip, qmax(bits)
        self.parts: list[Tensor] = []

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one Site: ``x`` is ``[1, length, features]``."""
        text = x[:, self.skip :]
        amax = smooth_maximum(text)
        if self.objective == "error":
            self.parts.append(text.numel() * (amax / self.limit).square() / 12)
        else:
            self.parts.append(amax)

    @property
    def total(self) -> Tensor:
        """The stand-in for the objective, a scalar."""
        parts = torch.stack(self.parts)
        return parts.sum() if self.objective == "error" else smooth_maximum(parts)


def smooth_maximum(x: Tensor) -> Tensor:
    """Return the p-norm of all elements: at least the largest magnitude, a scalar."""
    # The largest magnitude is a constant here: it keeps the powers within float32 and cancels in value and gradient.
    unit = x.detach().abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    total: Tensor = unit * (x / unit).pow(NORM).sum().clamp(min=torch.finfo(x.dtype).tiny).pow(1 / NORM)
    return total


def smooth_objective(
    model: TorchRunner, past: KeysValues, text: IntArray, slot: Tensor, objective: Objective
) -> Tensor:
    """Return the smooth stand-in for L_q(text | p, slot), a scalar that is differentiable in ``slot``.

    Args:
        model: the model; frozen.
        past: keys and values of the prefix p so far.
        text: int64 ``[n]``.
        slot: float32 ``[hidden]``, the input embedding at the position after p.
        objective: what it stands for.
    """
    measured = SmoothObjective(objective, skip=1)
    words = model.module.get_input_embeddings()(torch.from_numpy(text))
    begin = past[0][0].shape[2] if past else 0
    with observed(model, measured, {site: linears for site, linears in model.sites.items() if site != HEAD_SITE}):
        model.module.base_model(
            inputs_embeds=torch.cat([slot[None], words])[None],
            past_key_values=cache_of(past, 1),
            position_ids=torch.arange(begin, begin + len(text) + 1)[None],
        )
    return measured.total


def gradient_changes(
    model: TorchRunner,
    past: KeysValues,
    text: IntArray,
    start: Tensor,
    objective: Objective,
    *,
    progress: Progress = silent,
) -> FloatArray:
    """Return how each token would change the objective to first order; most negative is best.

    Args:
        model: the model.
        past: keys and values of the prefix p so far.
        text: int64 ``[n]``; the first :data:`TEXT_TOKENS` of them are used.
        start: float32 ``[hidden]``, the embedding e_0 that the slot begins at.
        objective: what to lower.
        progress: where to report.

    Returns:
        float32 ``[vocab]``, as a share of the stand-in's value at the start.
    """
    task = "taking the gradient of the objective"
    progress(task, 0, 1)
    embed = model.module.get_input_embeddings()
    slot = start.clone().requires_grad_()
    value = smooth_objective(model, past, text[:TEXT_TOKENS], slot, objective)
    (gradient,) = torch.autograd.grad(value, slot)
    gradient /= value.detach()
    tokens = torch.arange(model.spec.vocab_size)
    changes: FloatArray = torch.cat([(embed(ids) - start) @ gradient for ids in tokens.split(CHUNK)]).numpy()  # type: ignore[no-untyped-call]
    progress(task, 1, 1)
    return changes


def mean_embedding(model: TorchRunner) -> Tensor:
    """Return the mean input embedding of the vocabulary, float32 ``[hidden]``."""
    embed, tokens = model.module.get_input_embeddings(), torch.arange(model.spec.vocab_size)
    total = torch.stack([embed(ids).double().sum(dim=0) for ids in tokens.split(CHUNK)]).sum(dim=0)  # type: ignore[no-untyped-call]
    return (total / len(tokens)).float()


def positions_run(text: IntArray) -> int:
    """Return the positions that :func:`gradient_changes` sends through the model, forward and backward counted each.

    With frozen weights a backward pass multiplies by every weight once, as a forward pass does.
    """
    return 2 * (min(len(text), TEXT_TOKENS) + 1)
