"""Checks of codes and logits of two graphs, and the Site to blame for those that fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.compare import CodeDistance, compare_logits
from cushion_deploy.parity.limits import CODE_DIFFERENCE, IDENTICAL_CODES
from cushion_deploy.parity.torch_results import TorchReference

LOGITS = "max |logit difference|"


def first_diverging(
    distances: Mapping[Site, CodeDistance], identical: float = IDENTICAL_CODES, largest: int = CODE_DIFFERENCE
) -> Site | None:
    """Return the first Site, in order of computation, whose codes exceed a limit; None for none."""
    for site, d in distances.items():
        if d.identical < identical or d.largest > largest:
            return site
    return None


def logit_check(
    rung: str,
    expected: FloatArray,
    found: FloatArray,
    reference: TorchReference,
    share: float | None = None,
    largest: float | None = None,
) -> ParityCheck:
    """Return the check of logits ``[1, n, vocab]``.

    They are at most the limit of the reference apart, or, if ``share`` is given, at most that share of ``largest``, by
    default the largest of ``expected``.
    """
    distance = compare_logits(expected, found)
    if share is None:
        note = f"{distance.words()}; {reference.noise_words}"
        return ParityCheck(rung, LOGITS, distance.maximum, reference.logits_within, "at most", note=note)
    value = distance.maximum / max(float(np.abs(expected).max()) if largest is None else largest, 1e-30)
    return ParityCheck(rung, f"{LOGITS} / max |logit|", value, share, "at most", note=distance.words())


def segment_checks(
    logits: ParityCheck,
    distances: Mapping[Site, CodeDistance],
    identical: float = IDENTICAL_CODES,
    largest: int = CODE_DIFFERENCE,
) -> list[ParityCheck]:
    """Return the checks of the codes, and the check of the logits with the Site to blame if it fails."""
    rung, blamed = logits.rung, first_diverging(distances, identical, largest)
    worst = min(distances, key=lambda site: distances[site].identical)
    mean = float(np.mean([d.identical for d in distances.values()]))
    note = f"lowest at {worst}; mean over {len(distances)} Sites {100 * mean:.4f} %"
    if blamed:
        note = f"first diverging Site: {blamed}; {note}"
    found = distances[worst].identical
    difference = max(d.largest for d in distances.values())
    # A quantized head gets the codes of the reference, so no earlier Site affects its logits. A head in floating point
    # reads the residual stream, which no quantizer cuts, so an earlier Site can be to blame.
    before = None if HEAD_SITE in distances else blamed
    return [
        ParityCheck(rung, "identical INT8 codes, lowest Site", found, identical, "at least", blamed, note),
        ParityCheck(rung, "largest code difference", difference, largest, "at most", blamed),
        blame(logits, before, tuple(distances)),
    ]


def blame(check: ParityCheck, site: Site | None, sites: Sequence[Site]) -> ParityCheck:
    """Return the check; if it fails, with ``site`` to blame, or what follows the last Site if that is None."""
    if check.passed:
        return check
    if site:
        where = f"first diverging Site: {site}"
    else:
        # What follows the last Site has a name only if that Site is the head.
        site = HEAD_SITE if sites[-1] == HEAD_SITE else None
        where = f"the difference arises after the input of the last Site, {sites[-1]}"
    return replace(check, site=site, note="; ".join(filter(None, (where, check.note))))
