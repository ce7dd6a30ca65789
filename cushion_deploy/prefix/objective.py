"""The objective of the search: quantization error (Eq. 6) or the largest activation, over text tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.fakequant import qmax
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.sweep import Batch
from cushion_deploy.prefix.first_layers import first_layers

Objective = Literal["error", "max"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


class RowObjective:
    """Accumulates the objective of every row of a batch over all Sites.

    ``error`` is the sum over Sites and text tokens of ||X - q(X)||^2 (Eq. 6), with the per-tensor symmetric scale of
    that row's own text tokens; ``max`` is the largest magnitude over all Sites. The first ``skip`` positions are not
    text and count for neither, nor do text tokens that are not in ``kept``.

    Attributes:
        totals: the objective so far, float64 ``[rows]`` (float32 on a device without float64).
    """

    def __init__(
        self, objective: Objective, totals: Tensor, skip: int, bits: int = 8, kept: Tensor | None = None
    ) -> None:
        """Begin at ``totals``, zeros float64 ``[rows]``; ``kept`` is bool ``[text]``, None for every token."""
        self.objective, self.totals, self.skip, self.limit, self.kept = objective, totals, skip, qmax(bits), kept

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one Site with input ``x`` ``[rows, length, features]``."""
        text = x[:, self.skip :]
        text = (text if self.kept is None else text[:, self.kept]).flatten(1).float()
        # Two passes without a copy: abs() and amax() take 1.4 times as long, aminmax() five times.
        amax = torch.maximum(text.amax(dim=1), -text.amin(dim=1))
        if self.objective == "max":
            self.totals = torch.maximum(self.totals, amax.to(self.totals.dtype))
            return
        scale = (amax / self.limit).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        codes = (text / scale).round_().clamp_(-self.limit - 1, self.limit)
        error = codes.mul_(scale).sub_(text)
        self.totals += (error * error).sum(dim=1).to(self.totals.dtype)


@torch.inference_mode()
def score_candidates(
    model: TorchRunner,
    past: KeysValues,
    text: IntArray,
    candidates: Sequence[int],
    objective: Objective,
    *,
    bits: int = 8,
    depth: int | None = None,
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
        bits: bits of the codes that the error is measured for.
        depth: layers to run and to measure, from the first; None for all.
        batch_positions: positions per forward pass, which bounds memory.
        progress: where to report the number of candidates done.
    """
    rows = max(1, batch_positions // (len(text) + 1))
    body = model.tensor(text)
    chosen = [model.tensor(list(candidates[start : start + rows])) for start in range(0, len(candidates), rows)]
    batches = [Batch(torch.cat([ids[:, None], body.expand(len(ids), -1)], dim=1)) for ids in chosen]
    measured = [RowObjective(objective, _totals(model, batch), skip=1, bits=bits) for batch in batches]
    return _scores(
        model, past.before_candidate(), batches, measured, depth, progress, f"scoring candidates on {len(text)} tokens"
    )


@torch.inference_mode()
def score_prefix(
    model: TorchRunner,
    past: KeysValues,
    text: IntArray,
    objective: Objective,
    kept: Tensor | None = None,
    *,
    bits: int = 8,
) -> float:
    """Return L_q(text | p), the objective of text int64 ``[n]`` behind ``past``, for codes of ``bits`` bits.

    With ``kept``, bool ``[n]``, every token is still run, but only those count, in errors and scales.
    """
    batch = Batch(model.tensor(text)[None])
    measured = RowObjective(objective, _totals(model, batch), skip=0, bits=bits, kept=kept)
    return _scores(model, past, [batch], [measured])[0]


def _scores(
    model: TorchRunner,
    past: KeysValues,
    batches: Sequence[Batch],
    measured: Sequence[RowObjective],
    depth: int | None = None,
    progress: Progress = silent,
    task: str = "",
) -> list[float]:
    """Return the objective of every row of all batches, which ``measured`` accumulates batch by batch."""
    depth = model.spec.num_layers if depth is None else depth
    current = 0

    def before(number: int) -> None:
        nonlocal current
        current = number

    def add(site: Site, x: Tensor) -> None:
        measured[current](site, x)

    with first_layers(model, depth) as sites, observed(model, add, sites):
        model.sweep(batches, past.of_first(depth), before=before, progress=progress, task=task)
    # The totals of batches that other processes ran are zero here.
    totals = model.reduce(torch.cat([each.totals for each in measured]), "sum") if measured else model.zeros(0)
    return [float(value) for value in totals]


def _totals(model: TorchRunner, batch: Batch) -> Tensor:
    return model.zeros(len(batch.ids), dtype=model.wide)
