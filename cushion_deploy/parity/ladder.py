"""The parity ladder: FP torch -> fake-quant torch -> canonical ONNX -> compiled engine -> decode against prefill.

A check that fails names the first Site, in order of computation, at which the two sides differ.

Limits of codes hold for every faithful graph. Limits of float logits are multiples of the model's own rounding noise
(noise.py), which grows with its depth, its width and the size of its logits. Free runs of two quantized graphs drift
apart by rounding alone (see segments.py), so codes are compared segment by segment, and free runs by perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.fakequant import Int8Array
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.evaluate.perplexity import TextScore, nll_of_logits
from cushion_deploy.parity.blame import SiteInputs, first_differing_input, twin_inputs
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.compare import CodeDistance, common_prefix, compare_codes, compare_logits
from cushion_deploy.parity.segments import SegmentRun, SiteCodes

NOISE = 16
"""Largest difference of float32 logits of two faithful graphs, in units of the rounding noise of the model.

Both sides round by about as much as the noise, which is the largest of a sample. Measured with 64 tokens as the sample
and 256 as the text: 0.7 to 1.0 in SmolLM2.
"""
IDENTICAL_CODES = 0.999
CODE_DIFFERENCE = 1
PERPLEXITY = 0.005
"""Relative difference of perplexity between engine and fake-quant, on top of two standard errors of the difference."""
LOGITS = "max |logit difference|"
GREEDY_TOKENS = 32
PIECE = 128
"""Tokens whose logits are in memory at once."""
# float16 has 11 bits of precision: one rounding moves a code q by up to |q| / 2048, and the code flips with a
# probability equal to the mean distance moved: 1 % for |q| of 20. In attention, rounding a score s changes its weight
# by |s| / 2048 of it, so more than one code is possible. Measured at the lowest Site: 97.8 % identical in SmolLM2,
# largest difference 1; in tiny random models 96.6 % and 2. With a scale that is 5 % wrong, half of the codes are
# identical.
#
# bfloat16 has 8 bits: all differences are 8 times as large, and so are the limits. Measured: 83.6 % identical at
# the lowest Site of SmolLM2, largest difference 5, logits 1.5 %; in Gemma 3 270M, whose residual stream reaches 98,858,
# 86.7 %, 6 and 2.4 %.
#
# Logits: a quantized head rounds once, 2^-11; a head in floating point reads a residual stream that every layer rounds
# (0.2 % measured in SmolLM2, which has 60 such additions).
PLAN_LIMITS = {
    "float32": (IDENTICAL_CODES, CODE_DIFFERENCE, 2**-16),
    "float16": (0.95, 2, 2**-8),
    "bfloat16": (0.6, 16, 2**-5),
}
"""By type: smallest share of identical codes, largest code difference, largest logit difference / largest logit."""
TIED_HEAD_LOGITS = 2**-12
"""Largest logit difference / largest logit of the kernels of ONNX Runtime, where a tied head reads INT8 codes.

Its kernel gets the head's input in two parts and rounds the smaller one to 8 bits. A value is off by at most 1 / 254^2
of the largest of its block. Measured: 2^-14.4 in Gemma 3 270M, of 50 million logits.
"""


@dataclass(frozen=True)
class TorchReference:
    """Results of torch on the parity text, behind the prefix.

    Attributes:
        ids: int64 ``[1, n]``.
        float_logits: ``[1, n, vocab]`` of the floating-point model.
        quantized_logits: ``[1, n, vocab]`` of the fake-quantized model.
        codes: int8 codes that enter each Site of the fake-quantized model.
        windows: int64 ``[count, window]`` for perplexity.
        quantized_nll: token losses of the fake-quantized model on ``windows``, ``[count, window - 1]``.
        prompt: int64 ``[1, m]``.
        greedy: greedy continuation of ``prompt`` by the fake-quantized model.
        noise: largest difference of the floating-point model's logits from those of float64 arithmetic.
    """

    ids: IntArray
    float_logits: FloatArray
    quantized_logits: FloatArray
    codes: SiteCodes
    windows: IntArray
    quantized_nll: FloatArray
    prompt: IntArray
    greedy: tuple[int, ...]
    noise: float

    @property
    def logits_within(self) -> float:
        """The largest difference of float32 logits between two faithful graphs."""
        return NOISE * self.noise

    @property
    def noise_words(self) -> str:
        """The noise as text, for the notes of the checks that it limits."""
        return f"limit: {NOISE} times the rounding noise of the model, {self.noise:.2g}"

    @property
    def ties(self) -> float:
        """The share of positions whose two largest float logits are so close that noise decides which is larger."""
        top = np.partition(self.float_logits, -2, axis=-1)[..., -2:]
        return float((top[..., 1] - top[..., 0] <= 2 * self.logits_within).mean())


def float_rung(reference: TorchReference, twin: ExportedGraph, inputs: Callable[[], SiteInputs]) -> list[ParityCheck]:
    """Compare the float twin in ONNX Runtime with transformers.

    Args:
        reference: results of torch.
        twin: the graph without Q/DQ.
        inputs: returns the input of each Site in transformers; called only if a check fails, to find the Site.
    """
    session = open_session(twin, chunk=reference.ids.shape[1], prepack=False)
    logits = session.run(reference.ids, need_logits="all")
    distance = compare_logits(reference.float_logits, _required(logits))
    rung = "float graph against transformers"
    note = f"{distance.words()}; {reference.noise_words}"
    ties = reference.ties
    checks = [
        ParityCheck(rung, LOGITS, distance.maximum, reference.logits_within, "at most", note=note),
        ParityCheck(
            rung,
            "top-1 agreement",
            distance.top1,
            1.0 - ties,
            "at least",
            note=f"{100 * ties:.2f} % of the positions are ties within the noise" if ties else "",
        ),
    ]
    if all(check.passed for check in checks):
        return checks
    expected = inputs()
    site = first_differing_input(expected, twin_inputs(twin, tuple(expected), reference.ids))
    return [_blame(check, site, tuple(expected)) for check in checks]


def segment_rung(
    rung: str, reference: TorchReference, run: SegmentRun, logits_within: float | None = None
) -> list[ParityCheck]:
    """Compare a quantized graph with fake-quant Site by Site, from identical codes.

    Args:
        rung: name of the rung.
        reference: results of torch.
        run: the graph.
        logits_within: largest logit difference / largest logit, for kernels that round the input of the head; None for
            that of the reference.
    """
    logits, codes, _ = run(reference.ids, reference.codes)
    distances = compare_codes(reference.codes, codes)
    logit_check = _logit_check(rung, reference.quantized_logits, logits, reference, logits_within)
    return _segment_checks(logit_check, distances)


def plan_rung(rung: str, reference: TorchReference, run: SegmentRun, plan: SegmentRun) -> list[ParityCheck]:
    """Compare the graph of a plan with the bundle's graph ``run`` Site by Site, from identical codes.

    This checks structure, constants and range of the graph (the result of every operator is rounded to its type), not
    the arithmetic of a GPU. A text longer than a static cache is truncated.
    """
    identical, largest, of_logits = PLAN_LIMITS[plan.graph.contract.dtype]
    room = plan.room
    ids, forced = reference.ids[:, :room], {site: c[:, :room] for site, c in reference.codes.items()}
    logits, codes, _ = run(ids, forced)
    run.close()
    plan_logits, plan_codes, _ = plan(ids, forced)
    distances = compare_codes(codes, plan_codes)
    logit_check = _logit_check(rung, logits, plan_logits, reference, of_logits)
    checks = _segment_checks(logit_check, distances, identical, largest)
    if plan.not_finite:
        note = f"not finite at {plan.not_finite}: a value before it exceeds the range of {plan.graph.contract.dtype}"
        checks[0] = replace(checks[0], note=f"{note}; {checks[0].note}")
    return checks


def engine_rung(
    rung: str,
    reference: TorchReference,
    session: DecoderSession,
    progress: Progress = silent,
    segments: Sequence[ParityCheck] = (),
) -> tuple[list[ParityCheck], TextScore]:
    """Compare free runs of an engine and of fake-quant by perplexity; also return the losses of the engine.

    Args:
        rung: name of the rung.
        reference: results of torch.
        session: the engine.
        progress: where to report the number of windows done.
        segments: checks of the segment rung of the same kernels, which name the Site that a free run cannot name.
    """
    losses = []
    for done, window in enumerate(reference.windows, 1):
        losses.append(_losses(session, window))
        progress("perplexity of the engine", done, len(reference.windows))
    score = TextScore(np.stack(losses))
    difference = (score.losses - reference.quantized_nll).astype(np.float64).ravel()
    change, error = float(difference.mean()), float(difference.std() / math.sqrt(difference.size))
    greedy = greedy_tokens(session, reference.prompt, len(reference.greedy))
    same = common_prefix(greedy, reference.greedy)
    note = (
        f"{100 * math.expm1(change):+.2f} % ± {100 * error:.2f} % (standard error) on {difference.size} tokens; "
        f"greedy continuation equal for {same} of {len(reference.greedy)} tokens"
    )
    # Free runs of one quantized model differ by chance (segments.py); the standard error allows for that.
    limit = PERPLEXITY + 2 * error
    metric = "perplexity difference (limit: 0.5 % + 2 standard errors)"
    check = ParityCheck(rung, metric, abs(change), limit, "at most", note=note)
    if not check.passed and segments:
        site = next((c.site for c in segments if c.site), None)
        where = f"first diverging Site: {site}" if site else "no segment diverges"
        check = replace(check, site=site, note=f"on rung '{segments[0].rung}', {where}; {note}")
    return [check], score


def _losses(session: DecoderSession, window: IntArray) -> FloatArray:
    """Return the losses of tokens 1.. of a window int64 ``[n]``, fed in pieces as a long prompt would be."""
    session.reset()
    found = []
    for start in range(0, len(window), PIECE):
        logits = _required(session.run(window[None, start : start + PIECE], need_logits="all"))
        found.append(nll_of_logits(logits, window[None, start : start + PIECE + 1])[0])
    return np.concatenate(found)


def decode_rung(rung: str, reference: TorchReference, session: DecoderSession, tokens: int) -> list[ParityCheck]:
    """Compare decoding the last ``tokens`` one by one through the cache with one prefill, in one float32 session."""
    ids = reference.ids
    session.reset()
    prefill = _required(session.run(ids, need_logits="all"))[:, -tokens:]
    session.reset()
    session.run(ids[:, :-tokens], need_logits="none")
    steps = [_required(session.run(ids[:, i : i + 1])) for i in range(ids.shape[1] - tokens, ids.shape[1])]
    distance = compare_logits(prefill, np.concatenate(steps, axis=1))
    note = f"{distance.words()}; {reference.noise_words}"
    return [ParityCheck(rung, LOGITS, distance.maximum, reference.logits_within, "at most", note=note)]


def segment_decode_rung(
    rung: str, reference: TorchReference, run: SegmentRun, tokens: int, logits_within: float | None = None
) -> list[ParityCheck]:
    """Compare single decode steps with a prefill Site by Site, from identical codes and the cache of the prefill.

    The limits are those of the graph's type, because both sides round alike but sum in different orders. A text longer
    than a static cache is truncated. ``logits_within`` is that of :func:`segment_rung`.
    """
    dtype, ids = run.graph.contract.dtype, reference.ids[:, : run.room]
    forced = {site: c[:, : run.room] for site, c in reference.codes.items()}
    logits, codes, present = run(ids, forced)
    length = ids.shape[1]
    tokens = min(tokens, length // 2)
    slots = next(iter(present.values())).shape[2] - length  # those of a prefix in the cache
    decoded: dict[Site, list[Int8Array]] = {site: [] for site in codes}
    steps = []
    for t in range(length - tokens, length):
        past = {
            n.replace("present", "past_key_values"): np.ascontiguousarray(v[:, :, : slots + t])
            for n, v in present.items()
        }
        row = {site: c[:, t : t + 1] for site, c in forced.items()}
        step, found, _ = run(ids[:, t : t + 1], row, past)
        steps.append(step)
        for site, c in found.items():
            decoded[site].append(c)
    joined = {site: np.concatenate(parts, axis=1) for site, parts in decoded.items()}
    identical, largest, share = PLAN_LIMITS[dtype]
    if logits_within is None and dtype != "float32":
        logits_within = share
    whole, decodes = logits[:, -tokens:], np.concatenate(steps, axis=1)
    logit_check = _logit_check(rung, whole, decodes, reference, logits_within, float(np.abs(logits).max()))
    last = {site: c[:, -tokens:] for site, c in codes.items()}
    return _segment_checks(logit_check, compare_codes(last, joined), identical, largest)


def greedy_tokens(session: DecoderSession, prompt: IntArray, count: int) -> list[int]:
    """Return the greedy continuation of a prompt, int64 ``[1, m]``."""
    session.reset()
    logits = _required(session.run(prompt))
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(logits[0, -1].argmax()))
        logits = _required(session.run(np.array([[tokens[-1]]], dtype=np.int64)))
    return tokens


def first_diverging(
    distances: Mapping[Site, CodeDistance], identical: float = IDENTICAL_CODES, largest: int = CODE_DIFFERENCE
) -> Site | None:
    """Return the first Site, in order of computation, whose codes exceed a limit; None for none."""
    for site, d in distances.items():
        if d.identical < identical or d.largest > largest:
            return site
    return None


def _logit_check(
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


def _segment_checks(
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
        _blame(logits, before, tuple(distances)),
    ]


def _blame(check: ParityCheck, site: Site | None, sites: Sequence[Site]) -> ParityCheck:
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


def _required(logits: FloatArray | None) -> FloatArray:
    if logits is None:
        raise TypeError("the session returned no logits although they were asked for")
    return logits
