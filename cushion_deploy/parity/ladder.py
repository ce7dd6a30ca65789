"""The parity ladder: FP torch -> fake-quant torch -> canonical ONNX -> compiled engine -> decode against prefill.

A check that fails names the first Site, in order of computation, at which the two sides differ.

Limits of codes hold for every faithful graph. Limits of float logits are multiples of the model's own rounding noise
(noise.py), which grows with its depth, its width and the size of its logits. Free runs of two quantized graphs drift
apart by rounding alone (see segments.py), so codes are compared segment by segment, and free runs by perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.fakequant import Int8Array
from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.core.progress import Progress, silent, titled
from cushion_deploy.core.session import DecoderSession
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.evaluate.perplexity import TextScore, nll_of_logits
from cushion_deploy.parity.blame import SiteInputs, first_differing_input, twin_inputs
from cushion_deploy.parity.checks import ParityCheck
from cushion_deploy.parity.compare import common_prefix, compare_codes, compare_logits
from cushion_deploy.parity.limits import PERPLEXITY, PLAN_LIMITS
from cushion_deploy.parity.segment_checks import LOGITS, blame, logit_check, segment_checks
from cushion_deploy.parity.segments import SegmentRun
from cushion_deploy.parity.torch_results import TorchReference

FLOAT_RUNG = "float graph against transformers"
PIECE = 128
"""Tokens whose logits are in memory at once."""


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
    note = f"{distance.words()}; {reference.noise_words}"
    ties = reference.ties
    checks = [
        ParityCheck(FLOAT_RUNG, LOGITS, distance.maximum, reference.logits_within, "at most", note=note),
        ParityCheck(
            FLOAT_RUNG,
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
    return [blame(check, site, tuple(expected)) for check in checks]


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
    logits_check = logit_check(rung, reference.quantized_logits, logits, reference, logits_within)
    return segment_checks(logits_check, distances)


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
    logits_check = logit_check(rung, logits, plan_logits, reference, of_logits)
    checks = segment_checks(logits_check, distances, identical, largest)
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
        progress: where to report the windows and the tokens done.
        segments: checks of the segment rung of the same kernels, which name the Site that a free run cannot name.
    """
    losses = []
    for done, window in enumerate(reference.windows, 1):
        losses.append(_losses(session, window))
        progress(f"{rung}: perplexity", done, len(reference.windows))
    score = TextScore(np.stack(losses))
    difference = (score.losses - reference.quantized_nll).astype(np.float64).ravel()
    change, error = float(difference.mean()), float(difference.std() / math.sqrt(difference.size))
    told = titled(progress, rung)
    greedy = greedy_tokens(session, reference.prompt, len(reference.greedy), told)
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


def decode_rung(
    rung: str, reference: TorchReference, session: DecoderSession, tokens: int, progress: Progress = silent
) -> list[ParityCheck]:
    """Compare decoding the last ``tokens`` one by one through the cache with one prefill, in one float32 session.

    ``progress`` is told the number of tokens done.
    """
    progress(rung, 0, tokens)
    ids = reference.ids
    session.reset()
    prefill = _required(session.run(ids, need_logits="all"))[:, -tokens:]
    session.reset()
    session.run(ids[:, :-tokens], need_logits="none")
    steps = []
    for i in range(ids.shape[1] - tokens, ids.shape[1]):
        steps.append(_required(session.run(ids[:, i : i + 1])))
        progress(rung, len(steps), tokens)
    distance = compare_logits(prefill, np.concatenate(steps, axis=1))
    note = f"{distance.words()}; {reference.noise_words}"
    return [ParityCheck(rung, LOGITS, distance.maximum, reference.logits_within, "at most", note=note)]


def segment_decode_rung(
    rung: str,
    reference: TorchReference,
    run: SegmentRun,
    tokens: int,
    logits_within: float | None = None,
    progress: Progress = silent,
) -> list[ParityCheck]:
    """Compare single decode steps with a prefill Site by Site, from identical codes and the cache of the prefill.

    The limits are those of the graph's type, because both sides round alike but sum in different orders. A text longer
    than a static cache is truncated. ``logits_within`` is that of :func:`segment_rung`; ``progress`` is
    told the number of tokens done.
    """
    dtype, ids = run.graph.contract.dtype, reference.ids[:, : run.room]
    forced = {site: c[:, : run.room] for site, c in reference.codes.items()}
    length = ids.shape[1]
    tokens = min(tokens, length // 2)
    progress(rung, 0, tokens)
    logits, codes, present = run(ids, forced)
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
        progress(rung, len(steps), tokens)
    joined = {site: np.concatenate(parts, axis=1) for site, parts in decoded.items()}
    identical, largest, share = PLAN_LIMITS[dtype]
    if logits_within is None and dtype != "float32":
        logits_within = share
    whole, decodes = logits[:, -tokens:], np.concatenate(steps, axis=1)
    logits_check = logit_check(rung, whole, decodes, reference, logits_within, float(np.abs(logits).max()))
    last = {site: c[:, -tokens:] for site, c in codes.items()}
    return segment_checks(logits_check, compare_codes(last, joined), identical, largest)


def greedy_tokens(session: DecoderSession, prompt: IntArray, count: int, progress: Progress = silent) -> list[int]:
    """Return the greedy continuation of a prompt, int64 ``[1, m]``."""
    session.reset()
    logits = _required(session.run(prompt))
    tokens: list[int] = []
    for done in range(1, count + 1):
        tokens.append(int(logits[0, -1].argmax()))
        logits = _required(session.run(np.array([[tokens[-1]]], dtype=np.int64)))
        progress("continuation", done, count)
    return tokens


def _required(logits: FloatArray | None) -> FloatArray:
    if logits is None:
        raise TypeError("the session returned no logits although they were asked for")
    return logits
