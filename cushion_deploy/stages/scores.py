"""The scores of a model on a text as JSON: perplexity and divergence from the original model, with standard errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.store.json_files import finite

if TYPE_CHECKING:
    from cushion_deploy.modeling.teacher import Fidelity

DIVERGENCES = ("divergence", "divergence_stderr", "kl_after_16", "kl_after_16_stderr")
"""The scores that compare a model with the original one."""


def scores_of(found: Fidelity) -> dict[str, float | None]:
    """Return ``perplexity``, its ``stderr`` and ``DIVERGENCES``; null where a value is not finite.

    ``kl_after_16`` leaves out positions 0 to 15 of every window, and is null if no position is left.
    """
    score = TextScore(found.losses)
    return {
        "perplexity": finite(score.perplexity),
        "stderr": finite(score.stderr),
        "divergence": _not_negative(found.divergence),
        "divergence_stderr": finite(found.divergence_stderr),
        "kl_after_16": _not_negative(found.later.divergence),
        "kl_after_16_stderr": finite(found.later.divergence_stderr),
    }


def _not_negative(divergence: float) -> float | None:
    """Return a divergence; rounding errors can make one of zero negative."""
    return finite(max(divergence, 0.0))
