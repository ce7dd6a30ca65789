"""The objective of the search: quantization error (Eq. 6) or the largest activation, over text tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.fakequant import qmax
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner

Objective = Literal["error", "max"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class RowObjective:
    """Accumulates the objective of every row of a batch over all Sites.

    ``error`` is the sum over Sites and text tokens of ||X - q(X)||^2 (Eq. 6), with the per-tensor symmetric scale of
    that row's own text tokens; ``max`` is the largest magnitude over all Sites. The first ``skip`` positions are not
    text and count for neither.

    Attributes:
        totals: the objective so far, float64 ``[rows]``.
    """

    def __init__(self, objective: Objective, totals: Tensor, skip: int, bits: int = 8) -> None:
        """Begin at ``totals``, zeros float64 ``[rows]``."""
        self.objective, self.totals, self.skip, self.limit = objective, totals, skip, qmax(bits)

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one Site with input ``x`` ``[rows, length, features]``."""
        text = x[:, self.skip :].flatten(1)
        amax = text.abs().amax(dim=1)
        if self.objective == "max":
            self.totals = torch.maximum(self.totals, amax.double())
            return
        scale = (amax / self.limit).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = (text / scale).round_().clamp_(-self.limit - 1, self.limit)
        error = codes.mul_(scale).sub_(text)
        self.totals += (error * error).sum(dim=1).double()


@torch.inference_mode()
def score_candidates(
    model: TorchRunner,
    past: KeysValues,
    text: IntArray,
    candidates: Sequence[int],
    objective: Objective,
    *,
    batch_positions: int = 2048,
    progress: Progress = silent,
) -> list[float]:
    """Return L_q(text | p, c), exact, for every candidate token c.

    Args:
        model: the model.
        past: keys and values of the prefix p so far, computed once for all candidates.
        text: int64 ``[n]``.
        candidates: token ids.
        objective: what to compute.
        batch_positions: positions per forward pass, which bounds memory.
        progress: where to report the number of candidates done.
    """
    rows = max(1, batch_positions // (len(text) + 1))
    body = model.tensor(text)
    scores: list[float] = []
    for start in range(0, len(candidates), rows):
        chosen = model.tensor(list(candidates[start : start + rows]))
        ids = torch.cat([chosen[:, None], body.expand(len(chosen), -1)], dim=1)
        scores += _row_scores(model, past, ids, objective, skip=1)
        progress(f"scoring candidates on {len(text)} tokens", len(scores), len(candidates))
    return scores


@torch.inference_mode()
def score_prefix(model: TorchRunner, past: KeysValues, text: IntArray, objective: Objective) -> float:
    """Return L_q(text | p), the objective of text int64 ``[n]`` behind the prefix ``past``."""
    return _row_scores(model, past, model.tensor(text)[None], objective, skip=0)[0]


def _row_scores(model: TorchRunner, past: KeysValues, ids: Tensor, objective: Objective, skip: int) -> list[float]:
    measured = RowObjective(objective, model.zeros(len(ids), dtype=torch.float64), skip)
    layers = {site: linears for site, linears in model.sites.items() if site != HEAD_SITE}
    with observed(model, measured, layers):
        model.run(ids, past, head=False)
    return [float(value) for value in measured.totals]
