"""The share of the objective that a prefix cannot remove, estimated before any candidate is screened.

A prefix takes the role of the attention sink, so what it can remove is what the sinks cost: their own error, and that
of the scales that have to span them. The floor is the objective of the text without its sinks, scales included,
divided by the objective of the whole text. It needs two passes of the text, a screened step some hundred.

It is an estimate, not a bound, because other tokens change a little behind another prefix. So it errs to the low side
twice: every token counts as a sink that is only a quarter as conspicuous as what ``doctor`` reports, and a step is
skipped only where the floor is a quarter above tau. Measured with exact scores:

- SmolLM2, 512 tokens, behind five prefixes of 0 and 1 tokens, four texts each: the best of 11 or 12 candidates leaves
  at least 1.1 times the floor. With nothing before the text, the floor is 0.08 to 0.11 and the best 0.10 to 0.15;
  behind a space the floor is 0.72 to 0.84 and the best 0.97 to 0.99.
- The same with fewer bits (256 tokens, 12 candidates, two texts): with nothing before the text, the floor is 0.06 at 8
  bits, 0.15 at 6 and 0.26 at 4, and the best 0.08, 0.18 and 0.28; behind a space the floor is 0.69 to 0.82, 0.81 to
  0.90 and 0.90 to 0.95, and the best 0.95 to 0.98. The fewer the bits, the closer the best is to the floor; it never
  falls below it.
- 288 steps on tiny models of all families, every token scored: where the floor was above 0.625, no token left less than
  0.57 (a random model). Where a sink was planted, the best token left 0.57 to 1.33 times the floor,
  which was at most 0.07 there.
"""

from __future__ import annotations

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.sinks import SINK_RATIO, token_sizes
from cushion_deploy.prefix.objective import Objective, score_prefix

WEAK_SINK = SINK_RATIO / 4
"""A token is left out if it enters any Site at this many times what the median token does."""
MARGIN = 1.25
"""A step is skipped where the floor exceeds tau by this factor."""


def floor_of(
    model: TorchRunner, past: KeysValues, text: IntArray, objective: Objective, before: float, *, bits: int = 8
) -> float:
    """Return what share of ``before``, L_q(text | p), remains without the sinks of the text; 1 if there are none.

    Args:
        model: the model.
        past: keys and values of the prefix p so far.
        text: int64 ``[n]``.
        objective: the objective.
        before: its value for the text behind the prefix so far.
        bits: bits of the codes that it is measured for.
    """
    _, _, ratios = token_sizes(model, past, text[None])
    kept = (ratios < WEAK_SINK).all(dim=0)[0]
    if bool(kept.all()):
        return 1.0
    return score_prefix(model, past, text, objective, kept, bits=bits) / before if bool(kept.any()) else 0.0


def cannot_pay(floor: float, tau: float) -> bool:
    """Return whether no token can be expected to lower the objective to ``tau`` of its value."""
    return floor > MARGIN * tau


def positions_run(text: IntArray) -> int:
    """Return the positions that :func:`floor_of` runs through the model at most."""
    return 2 * len(text)
