"""One score next to another, in words."""

from __future__ import annotations

from typing import Literal

from cushion_deploy.report.render.formatting import NONE
from cushion_deploy.study.document import Score
from cushion_deploy.study.tables import change, divergence, later_divergence


def over(value: Score | None, base: Score | None) -> str:
    """Return ``+4.2 % over`` or ``−1.0 % relative to``, to be followed by the name of the base."""
    text = change(value, base)
    if text == NONE:
        return "not comparable with"
    return f"{text} {'relative to' if text.startswith('−') else 'over'}"


def lower(a: Score | None, b: Score | None, measure: Literal["perplexity", "distance"]) -> bool:
    """Return whether ``a`` is better than ``b``; a value that is not finite never is."""
    if a is None or b is None:
        return False
    value, other = getattr(a, measure), getattr(b, measure)
    return value is not None and (other is None or value < other)


def nats(score: Score | None) -> str:
    """Return the divergence in nats per token, whole and from position 16 on."""
    found = f"{divergence(score)} nats per token"
    if score is None or score.kl_after_16 is None:
        return found
    return f"{found}, {later_divergence(score)} from position 16 on,"
