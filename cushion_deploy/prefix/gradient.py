"""Gradient screen: rank the vocabulary by the first-order change of a differentiable approximation of the objective.

The embedding e_0 at the position after the prefix is a free variable. One forward and backward pass gives, for every
token v at once, the first-order change of the objective if v were there: (e_v - e_0) . gradient (HotFlip: Ebrahimi et
al., 2018; GCG: Zou et al., 2023). Like the self-sink screen it only filters; the exact objective decides.

round() has no useful gradient, so the error of a Site is approximated by uniform rounding noise, n * scale^2 / 12.
Fewer bits multiply that error by the same factor for every token, so the ranking has no bits.
The scale is amax / qmax, whose gradient would depend on a single element, so amax is approximated by a p-norm over the
text tokens, which is scale-free and spreads the gradient over all elements that are nearly as large.

e_0 is the mean embedding of the vocabulary. It belongs to no token, so it favours none for being near. It also removes
the error that an average token removes, so the gradient points to tokens that remove more than that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.fakequant import qmax
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.modeling.layerwise import checkpointed
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix.objective import Objective

NORM = 16
"""Order of the p-norm that approximates the largest magnitude; even, so that it is smooth at zero."""
TEXT_TOKENS = 128
"""Tokens at the beginning of the text that the gradient is computed on; bounds memory."""
CHUNK = 4096
"""Rows of the embedding matrix read at once."""


class SmoothObjective:
    """Accumulates the differentiable objective of one row over all Sites.

    ``error`` is the sum over Sites of n * scale^2 / 12, with n elements and scale = ||X||_p / qmax; ``max`` is the
    p-norm of the p-norms of all Sites. The first ``skip`` positions are not text and do not count.
    """

    def __init__(self, objective: Objective, skip: int) -> None:
        """Begin without any Site."""
        self.objective, self.skip, self.limit = objective, skip, qmax(8)
        self.parts: list[Tensor] = []

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one Site with input ``x`` ``[1, length, features]``."""
        text = x[:, self.skip :].float()
        amax = smooth_maximum(text)
        if self.objective == "error":
            self.parts.append(text.numel() * (amax / self.limit).square() / 12)
        else:
            self.parts.append(amax)

    @property
    def total(self) -> Tensor:
        """The differentiable objective, a scalar."""
        parts = torch.stack(self.parts)
        return parts.sum() if self.objective == "error" else smooth_maximum(parts)


def smooth_maximum(x: Tensor) -> Tensor:
    """Return the p-norm of all elements, a scalar that is at least the largest magnitude."""
    # Dividing by a constant keeps the powers within float32, and cancels in value and gradient.
    unit = x.detach().abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    total: Tensor = unit * (x / unit).pow(NORM).sum().clamp(min=torch.finfo(x.dtype).tiny).pow(1 / NORM)
    return total


def smooth_objective(
    model: TorchRunner, past: KeysValues, text: IntArray, slot: Tensor, objective: Objective
) -> Tensor:
    """Return an approximation of L_q(text | p, slot), a scalar that is differentiable in ``slot``.

    Args:
        model: the model, frozen.
        past: keys and values of the prefix p so far.
        text: int64 ``[n]``.
        slot: float32 ``[hidden]``, the input embedding at the position after p.
        objective: the objective to approximate.
    """
    with differentiable_objective(model, past, text, slot, objective) as total:
        return total


@contextmanager
def differentiable_objective(
    model: TorchRunner, past: KeysValues, text: IntArray, slot: Tensor, objective: Objective
) -> Iterator[Tensor]:
    """Yield what :func:`smooth_objective` returns; take its gradient within the context.

    The layers of a streamed model run again for the gradient, under the same hooks: autograd would keep their weights.
    """
    measured = SmoothObjective(objective, skip=1)
    embeddings = torch.cat([slot[None].to(model.dtype), model.module.get_input_embeddings()(model.tensor(text))])
    layers = {site: linears for site, linears in model.sites.items() if site != HEAD_SITE}
    with ExitStack() as stack:
        stack.enter_context(observed(model, measured, layers))
        if model.placed.streamed_layers:
            stack.enter_context(checkpointed(model.layers))
        model.run(embeddings[None], past.before_candidate(), head=False)
        yield measured.total


def gradient_changes(
    model: TorchRunner,
    past: KeysValues,
    text: IntArray,
    start: Tensor,
    objective: Objective,
    *,
    progress: Progress = silent,
) -> FloatArray:
    """Return the first-order change of the objective for each token; the most negative is best.

    Args:
        model: the model.
        past: keys and values of the prefix p so far.
        text: int64 ``[n]``; only the first :data:`TEXT_TOKENS` are used.
        start: float32 ``[hidden]``, the embedding e_0.
        objective: the objective to lower.
        progress: where to report progress.

    Returns:
        float32 ``[vocab]``, by place in ``model.vocabulary``, relative to the approximated objective at ``start``.
    """
    task = "taking the gradient of the objective"
    progress(task, 0, 1)
    embed = model.module.get_input_embeddings()
    slot = start.clone().requires_grad_()
    with differentiable_objective(model, past, text[:TEXT_TOKENS], slot, objective) as value:
        # Divided before the backward pass, in which the objective of a model with sinks would overflow float16.
        (gradient,) = torch.autograd.grad(value / value.detach(), slot)
    tokens = model.tensor(model.vocabulary)
    changes = torch.cat([(embed(ids).float() - start) @ gradient for ids in tokens.split(CHUNK)])  # type: ignore[no-untyped-call]
    progress(task, 1, 1)
    # Backward passes are not reproducible on a GPU, and all processes need the same candidates.
    return model.array(model.of_leader(changes))


def mean_embedding(model: TorchRunner) -> Tensor:
    """Return the mean input embedding of the vocabulary, float32 ``[hidden]``."""
    embed, tokens = model.module.get_input_embeddings(), model.tensor(model.vocabulary)
    total = torch.stack([embed(ids).to(model.wide).sum(dim=0) for ids in tokens.split(CHUNK)]).sum(dim=0)  # type: ignore[no-untyped-call]
    return (total / len(tokens)).float()


def positions_run(text: IntArray) -> int:
    """Return the positions that :func:`gradient_changes` runs through the model, counting the backward pass as well.

    With frozen weights a backward pass multiplies by every weight once, as a forward pass does.
    """
    return 2 * (min(len(text), TEXT_TOKENS) + 1)
