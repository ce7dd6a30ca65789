"""The parity ladder: FP torch -> fake-quant torch -> canonical ONNX -> compiled engine -> decode against prefill.

Limits are those of a faithful graph; they depend on no model. Free runs of two quantized graphs differ by chaos
(see segments.py), so codes are compared segment by segment, and free runs by perplexity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cushion_deploy.evaluate.perplexity import nll_of_logits
from cushion_deploy.fakequant import Int8Array
from cushion_deploy.parity.compare import CodeDistance, common_prefix, compare_codes, compare_logits
from cushion_deploy.parity.segments import SegmentRun, SiteCodes
from cushion_deploy.progress import Progress, silent
from cushion_deploy.runtime.session import DecoderSession, OnnxRuntimeSession
from cushion_deploy.types import ExportedGraph, FloatArray, IntArray, ParityCheck, Site

FLOAT_LOGITS = 2e-3
"""Largest difference of float logits, ONNX against transformers."""
IDENTICAL_CODES = 0.999
CODE_DIFFERENCE = 1
PERPLEXITY = 0.005
"""Relative difference of perplexity, engine against fake-quant, on top of two standard errors of the comparison."""
DECODE_LOGITS = 1e-3
GREEDY_TOKENS = 32


@dataclass(frozen=True)
class TorchReference:
    """What torch computed on the parity text, behind the prefix.

    Attributes:
        ids: int64 ``[1, n]``.
        float_logits: ``[1, n, vocab]`` of the floating-point model.
        quantized_logits: ``[1, n, vocab]`` of the fake-quantized model.
        codes: int8 codes that entered each Site in the fake-quantized run.
        windows: int64 ``[count, window]`` for perplexity.
        quantized_nll: token losses of the fake-quantized model on them, ``[count, window - 1]``.
        greedy: continuation of ``prompt`` by the fake-quantized model.
        prompt: int64 ``[1, m]``.
    """

    ids: IntArray
    float_logits: FloatArray
    quantized_logits: FloatArray
    codes: SiteCodes
    windows: IntArray
    quantized_nll: FloatArray
    prompt: IntArray
    greedy: tuple[int, ...]


def float_rung(reference: TorchReference, twin: ExportedGraph) -> list[ParityCheck]:
    """Compare the float twin in ONNX Runtime with transformers."""
    session = OnnxRuntimeSession(twin.path, twin.contract, chunk=reference.ids.shape[1])
    logits = session.run(reference.ids, need_logits="all")
    distance = compare_logits(reference.float_logits, _required(logits))
    rung = "float graph against transformers"
    return [
        ParityCheck(rung, "max |logit difference|", distance.maximum, FLOAT_LOGITS, "at most", note=distance.words()),
        ParityCheck(rung, "top-1 agreement", distance.top1, 1.0, "at least"),
    ]


def segment_rung(rung: str, reference: TorchReference, run: SegmentRun) -> list[ParityCheck]:
    """Compare a quantized graph with fake-quant Site by Site, from identical codes."""
    logits, codes, _ = run(reference.ids, reference.codes)
    distances = compare_codes(reference.codes, codes)
    distance = compare_logits(reference.quantized_logits, logits)
    return [
        *_code_checks(rung, distances),
        ParityCheck(rung, "max |logit difference|", distance.maximum, FLOAT_LOGITS, "at most", note=distance.words()),
    ]


def engine_rung(
    rung: str, reference: TorchReference, session: DecoderSession, progress: Progress = silent
) -> tuple[list[ParityCheck], float]:
    """Compare free runs of an engine and of fake-quant by perplexity; also return the engine's perplexity."""
    losses = []
    for done, window in enumerate(reference.windows, 1):
        session.reset()
        logits = _required(session.run(window[None], need_logits="all"))
        losses.append(nll_of_logits(logits, window[None])[0])
        progress("perplexity of the engine", done, len(reference.windows))
    difference = (np.stack(losses) - reference.quantized_nll).astype(np.float64).ravel()
    change, error = float(difference.mean()), float(difference.std() / math.sqrt(difference.size))
    greedy = greedy_tokens(session, reference.prompt, len(reference.greedy))
    same = common_prefix(greedy, reference.greedy)
    note = (
        f"{100 * math.expm1(change):+.2f} % ± {100 * error:.2f} % (standard error) on {difference.size} tokens; "
        f"greedy continuation equal for {same} of {len(reference.greedy)} tokens"
    )
    # Two free runs of one quantized model differ by chance (segments.py); the limit says how much of it is chance.
    limit = PERPLEXITY + 2 * error
    metric = "perplexity difference (limit: 0.5 % + 2 standard errors)"
    check = ParityCheck(rung, metric, abs(change), limit, "at most", note=note)
    return [check], math.exp(float(np.stack(losses).mean(dtype=np.float64)))


def decode_rung(rung: str, ids: IntArray, session: DecoderSession, tokens: int) -> list[ParityCheck]:
    """Compare decoding the last ``tokens`` one by one through the cache with one prefill, in the engine itself."""
    session.reset()
    prefill = _required(session.run(ids, need_logits="all"))[:, -tokens:]
    session.reset()
    session.run(ids[:, :-tokens], need_logits="none")
    steps = [_required(session.run(ids[:, i : i + 1])) for i in range(ids.shape[1] - tokens, ids.shape[1])]
    distance = compare_logits(prefill, np.concatenate(steps, axis=1))
    return [
        ParityCheck(rung, "max |logit difference|", distance.maximum, DECODE_LOGITS, "at most", note=distance.words())
    ]


def segment_decode_rung(rung: str, reference: TorchReference, run: SegmentRun, tokens: int) -> list[ParityCheck]:
    """Compare single decode steps with a prefill, Site by Site from identical codes, cache from the prefill."""
    logits, codes, present = run(reference.ids, reference.codes)
    length = reference.ids.shape[1]
    decoded: dict[Site, list[Int8Array]] = {site: [] for site in codes}
    steps = []
    for t in range(length - tokens, length):
        past = {n.replace("present", "past_key_values"): np.ascontiguousarray(v[:, :, :t]) for n, v in present.items()}
        row = {site: c[:, t : t + 1] for site, c in reference.codes.items()}
        step, found, _ = run(reference.ids[:, t : t + 1], row, past)
        steps.append(step)
        for site, c in found.items():
            decoded[site].append(c)
    joined = {site: np.concatenate(parts, axis=1) for site, parts in decoded.items()}
    distance = compare_logits(logits[:, -tokens:], np.concatenate(steps, axis=1))
    return [
        *_code_checks(rung, compare_codes({s: c[:, -tokens:] for s, c in codes.items()}, joined)),
        ParityCheck(rung, "max |logit difference|", distance.maximum, DECODE_LOGITS, "at most", note=distance.words()),
    ]


def greedy_tokens(session: DecoderSession, prompt: IntArray, count: int) -> list[int]:
    """Return the greedy continuation of a prompt, int64 ``[1, m]``."""
    session.reset()
    logits = _required(session.run(prompt))
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int(logits[0, -1].argmax()))
        logits = _required(session.run(np.array([[tokens[-1]]], dtype=np.int64)))
    return tokens


def first_diverging(distances: dict[Site, CodeDistance]) -> Site | None:
    """Return the first Site, in the order of the computation, whose codes break a limit."""
    for site, d in distances.items():
        if d.identical < IDENTICAL_CODES or d.largest > CODE_DIFFERENCE:
            return site
    return None


def _code_checks(rung: str, distances: dict[Site, CodeDistance]) -> list[ParityCheck]:
    blamed = first_diverging(distances)
    worst = min(distances, key=lambda site: distances[site].identical)
    mean = float(np.mean([d.identical for d in distances.values()]))
    note = f"lowest at {worst}; mean over {len(distances)} Sites {100 * mean:.4f} %"
    if blamed:
        note = f"first diverging Site: {blamed}; {note}"
    largest = max(d.largest for d in distances.values())
    return [
        ParityCheck(
            rung,
            "identical INT8 codes, lowest Site",
            distances[worst].identical,
            IDENTICAL_CODES,
            "at least",
            blamed,
            note,
        ),
        ParityCheck(rung, "largest code difference", largest, CODE_DIFFERENCE, "at most", blamed),
    ]


def _required(logits: FloatArray | None) -> FloatArray:
    if logits is None:
        raise TypeError("the session returned no logits although they were asked for")
    return logits
