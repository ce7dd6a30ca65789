"""The losses of tuning: how far predictions behind a prefix are from those of the original model, and L_q.

- ``invisible`` runs the model without quantization: a prefix that changes nothing but the outliers. L_pred is
  KL(original without prefix || model behind the prefix), the first positions of a text weighted less, because the
  original has its own attention sink there, and no prefix can be like it.
- ``distill`` runs the quantized model, and L_pred is the same divergence of it, all positions weighted alike.
- ``ce`` runs the quantized model, and L_pred is the cross-entropy of the text, as in the paper (Eq. 11).

With all of them L_q (Eq. 6) is the error of the inputs of the Sites under constant static scales. In ``invisible`` it
is the barrier that keeps the attention sink in the prefix: what changes predictions least is a prefix that no token
looks at, and then the sink, with its large activations, is back in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.fakequant import qmax
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.layerwise import checkpointed
from cushion_deploy.modeling.observe import observed, replaced
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import quantized_weights
from cushion_deploy.modeling.teacher import BEGIN, Teacher, divergence
from cushion_deploy.recipe import Tuning

POSITIONS = 1024
"""Positions whose logits are computed at once: those of 16 windows and a large vocabulary would take 4 GB a copy."""


def fake_quantize(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Return ``x`` quantized and dequantized, differentiable in ``x`` and ``scale`` (straight-through rounding)."""
    limit = qmax(bits)
    inside = torch.clamp(x.float() / scale, -limit - 1, limit)
    return ((inside + (inside.round() - inside).detach()) * scale).to(x.dtype)


@dataclass(frozen=True)
class Losses:
    """The losses of some windows.

    Attributes:
        prediction: L_pred in nats per token, weighted; differentiable.
        error: L_q (Eq. 6) of each window ``[windows]``, mean over its tokens; differentiable.
        tokens: divergence or cross-entropy of every prediction, float32 ``[windows, length - 1]``, without gradient.
            Column p is the prediction at position p of a window, of the token at p + 1.
    """

    prediction: Tensor
    error: Tensor
    tokens: Tensor


@dataclass
class TuningLoss:
    """The loss of keys and values of a prefix.

    Attributes:
        model: the model, with any smoothing folded in.
        sites: the Sites that are quantized.
        bits: bits of their codes.
        kept: positions of the prefix that stay in sight of sliding windows.
        config: which loss.
        parameters: ``keys`` and ``values`` ``[layers, kv_heads, length, head_dim]``; ``log_scales``, the logarithms of
            the scales of ``sites``, in their order.
        teacher: the original model without prefix.
    """

    model: TorchRunner
    sites: Mapping[Site, tuple[nn.Linear, ...]]
    bits: int
    kept: int
    config: Tuning
    parameters: Mapping[str, Tensor]
    teacher: Teacher = field(init=False)

    def __post_init__(self) -> None:
        self.teacher = Teacher(self.model)
        self._index = {site: i for i, site in enumerate(self.sites)}
        self._errors: list[Tensor] = []
        self._adding = False

    @contextmanager
    def ready(self, windows: IntArray, progress: Progress = silent) -> Iterator[None]:
        """Prepare the model for :meth:`of` of these windows int64 ``[windows, length]``, and for its gradient."""
        if self.config.loss != "ce":
            self.teacher.remember(windows, progress)
        with ExitStack() as stack:
            if self.config.quantized:
                stack.enter_context(replaced(self.model, self._quantize, self.sites))
                stack.enter_context(quantized_weights(self.model, self.sites))
            else:
                stack.enter_context(observed(self.model, self._observe, self.sites))
            # The weights of streamed layers must not wait for the backward pass either.
            if self.config.checkpointing or self.model.placed.streamed_layers:
                stack.enter_context(checkpointed(self.model.layers))
            yield

    def of(self, ids: IntArray) -> Losses:
        """Return the losses of windows int64 ``[windows, length]``.

        Call it, and differentiate the result, within :meth:`ready`.
        """
        states = zip(self.parameters["keys"], self.parameters["values"], strict=True)
        tokens, kind = self.model.tensor(ids), self.model.dtype
        layers = [(keys[None].to(kind), values[None].to(kind)) for keys, values in states]
        self._errors.clear()
        # What is run again for its gradient must compute its error again, but adds nothing; and to keep it would keep
        # all that was run again.
        self._adding = True
        try:
            hidden = self.model.run(tokens, KeysValues(layers, self.kept), head=False).last_hidden_state
            found = self._of_tokens(ids, tokens, hidden)
        finally:
            self._adding = False
        error = torch.stack(self._errors).sum(0) / ids.shape[1]
        self._errors.clear()
        weights = torch.ones_like(found[0])
        if self.config.loss == "invisible":
            weights[:BEGIN] = self.config.first_weight
        return Losses((found * weights).sum() / (len(ids) * weights.sum()), error, found.detach())

    def _of_tokens(self, ids: IntArray, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the loss of every prediction ``[windows, length - 1]`` from last hidden states."""
        following = tokens.roll(-1, 1)

        def of_piece(states: Tensor, part: slice) -> Tensor:
            scores = torch.log_softmax(self.model.head_logits(states), -1)
            if self.config.loss == "ce":
                return -scores.gather(-1, following[:, part, None])[..., 0]
            return divergence(scores, self.teacher.log_probabilities(ids, part))

        size, length = max(1, POSITIONS // len(ids)), ids.shape[1]
        again = self.config.checkpointing and torch.is_grad_enabled()
        found = []
        # Including the last position, which predicts nothing, because a quantized head has an error there too.
        for start in range(0, length, size):
            part = slice(start, min(start + size, length))
            given = hidden[:, part], part
            found.append(checkpoint(of_piece, *given, use_reentrant=False) if again else of_piece(*given))
        return torch.cat(found, 1)[:, :-1]

    def _quantize(self, site: Site, x: Tensor) -> Tensor:
        found = fake_quantize(x, self._scale(site), self.bits)
        self._add((x - found.detach()).float())
        return found

    def _observe(self, site: Site, x: Tensor) -> None:
        wide = x.float()
        with torch.no_grad():
            found = fake_quantize(wide, self._scale(site), self.bits)
        self._add(wide - found)

    def _scale(self, site: Site) -> Tensor:
        return self.parameters["log_scales"][self._index[site]].exp()

    def _add(self, difference: Tensor) -> None:
        error = difference.square().flatten(1).sum(1)
        if self._adding:
            self._errors.append(error)
