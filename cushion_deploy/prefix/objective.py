"""What a prefix is judged by: quantization error (Eq. 6) or the largest activation, over text tokens alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.fakequant import qmax
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.modeling.cache import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.observe import observed

Objective = Literal["error", "max"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class RowObjective:
    """Accumulates the objective of every row of a batch over all Sites.

    ``error`` is the sum over Sites and text tokens of ||X - q(X)||^2 (Eq. 6) with the per-tensor symmetric
    scale of that row's own text tokens; ``max`` is the largest magnitude over all Sites. The first ``skip``
    positions are no text: they enter neither scale nor error.
    """

    def __init__(self, objective: Objective, rows: int, skip: int, bits: int = 8) -> None:
        """Begin at zero for ``rows`` rows."""
        self.objective, self.skip, self.limit = objective, skip, qmax(bits)
        self.totals = torch.zeros(rows, dtype=torch.float64)

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one Site: ``x`` is ``[rows, length, features]``."""
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
    task: str = "scoring",
) -> list[float]:
    """Return L_q(text | p, c) for every candidate token c; exact, no shortcut.

    Args:
        model: the model.
        past: keys and values of the prefix p so far, computed once for all candidates.
        text: int64 ``[n]``.
        candidates: token ids.
        objective: what to measure.
        batch_positions: positions a forward pass, which bounds memory.
        progress, task: where to report candidates done.
    """
    rows = max(1, batch_positions // (len(text) + 1))
    body = torch.from_numpy(text)
    scores: list[float] = []
    for start in range(0, len(candidates), rows):
        chosen = torch.tensor(list(candidates[start : start + rows]))
        ids = torch.cat([chosen[:, None], body.expand(len(chosen), -1)], dim=1)
        scores += _row_scores(model, past, ids, objective, skip=1)
        progress(task, len(scores), len(candidates))
    return scores


@torch.inference_mode()
def score_prefix(model: TorchRunner, past: KeysValues, text: IntArray, objective: Objective) -> float:
    """Return L_q(text | p): the objective of int64 ``[n]`` text behind the prefix as it stands."""
    return _row_scores(model, past, torch.from_numpy(text)[None], objective, skip=0)[0]


def _row_scores(model: TorchRunner, past: KeysValues, ids: Tensor, objective: Objective, skip: int) -> list[float]:
    measured = RowObjective(objective, len(ids), skip)
    layers = {site: linears for site, linears in model.sites.items() if site != HEAD_SITE}
    with observed(model, measured, layers):
        model.run(ids, past, head=False)
    return [float(value) for value in measured.totals]
