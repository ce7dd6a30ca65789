"""What the numbers of a report say, in sentences: the verdict first, then prefix, parity and engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cushion_deploy.report.document import Engine, ParityRow, Perplexity, Report, Tuning
from cushion_deploy.report.wording import (
    listing,
    model_name,
    one_line,
    percent,
    perplexity,
    plural,
    size,
    value_and_limit,
)

Status = Literal["passed", "incomplete", "failed"]
COLUMNS = ("FP", "FP + prefix", "quantized", "quantized + prefix")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a build: ``failed`` when a check failed, ``incomplete`` when proof is missing."""

    status: Status
    sentence: str


def verdict(report: Report) -> Verdict:
    """Return the one sentence that opens the page and ends the build."""
    sentence = _subject(report) + _cost(report)
    failed = len(failed_checks(report))
    if failed:
        checks = plural(len(report.parity), "parity check")
        verb = "does" if failed == 1 else "do"
        return Verdict("failed", f"Do not deploy: {failed} of {checks} {verb} not hold. {sentence}")
    measured = report.perplexity is not None and report.perplexity.quantized_prefix is not None
    proven = measured and bool(report.parity) and any(engine.ran for engine in report.engines)
    return Verdict("passed" if proven else "incomplete", sentence)


def _subject(report: Report) -> str:
    name, precision = model_name(report.model.source), one_line(report.precision).upper()
    if any(engine.ran for engine in report.engines):
        return f"{name} runs in static {precision}"
    return f"{name} in static {precision}, run by no engine here, stands"


def _cost(report: Report) -> str:
    """Return what quantization costs in perplexity, with the prefix and without."""
    if report.perplexity is None:
        return "; its perplexity was not measured."
    p = report.perplexity
    if not has_prefix(report):
        quantized = p.quantized if p.quantized_prefix is None else p.quantized_prefix
        return f"{_at(quantized, p.fp, 'FP')}; {_why_no_prefix(report)}."
    after = _at(p.quantized_prefix, p.fp_prefix, "FP with the same prefix")
    if p.quantized is None or p.fp is None:
        return f"{after}; without the prefix no finite perplexity was measured."
    return f"{after}; without the prefix it would be {percent(p.quantized / p.fp - 1)}."


def _at(value: float | None, reference: float | None, name: str) -> str:
    if value is None or reference is None:
        return " with no finite perplexity to compare"
    change = value / reference - 1
    return f" at {percent(change)} perplexity {'over' if change >= 0 else 'against'} {name}"


def _why_no_prefix(report: Report) -> str:
    if report.search is None:
        return "it was built without a prefix"
    return "no prefix was needed: the search found no attention sink worth one"


def perplexity_rows(measured: Perplexity) -> list[tuple[str, list[str]]]:
    """Return the rows of the four-column table: the values, then their change against FP and FP + prefix."""
    columns = (measured.fp, measured.fp_prefix, measured.quantized, measured.quantized_prefix)

    def against(reference: int) -> list[str]:
        base = columns[reference]
        return [
            "" if value is None or base is None or index == reference else percent(value / base - 1)
            for index, value in enumerate(columns)
        ]

    rows = [
        ("perplexity", [perplexity(value) for value in columns]),
        ("against FP", against(0)),
        ("against FP + prefix", against(1)),
    ]
    if measured.divergence is not None:
        d = measured.divergence
        apart = (d.fp, d.fp_prefix, d.quantized, d.quantized_prefix)
        rows.append(("KL from FP, nats a token", ["" if value is None else f"{value:.4f}" for value in apart]))
    return rows


def has_prefix(report: Report) -> bool:
    """Return whether the built model carries a prefix."""
    return report.search is not None and bool(report.search.token_ids)


def prefix_sentence(report: Report) -> str:
    """Say what the prefix is, or in words why there is none."""
    if report.search is None:
        return "No prefix search was run: the model was built without a prefix."
    length = len(report.search.token_ids)
    if not length:
        return (
            "No prefix was needed. The search found no attention sink worth a prefix position, "
            "so the model runs exactly as it is."
        )
    return (
        f"The prefix is {plural(length, 'token')} long. "
        f"{'Its key and value stand' if length == 1 else 'Their keys and values stand'} in the graph as constants "
        "ahead of every text and take the part of the attention sink, so that no token of the text has to."
    )


def tuning_sentence(tuning: Tuning) -> str:
    """Say what tuning brought on the held-out text."""
    losses = {
        state.step: "not finite" if state.held_out is None else f"{state.held_out:.4f}" for state in tuning.states
    }
    what = "keys, values and activation scales" if tuning.scales_tuned else "keys and values"
    measure = "divergence from the original model" if tuning.loss == "distill" else "cross-entropy"
    begin = f"{plural(tuning.steps, 'step')} of tuning {what}"
    if tuning.skipped:
        begin += f" ({tuning.skipped} without effect, because a gradient was not finite)"
    if tuning.kept_step == 0:
        return f"{begin} did not lower the {measure} on held-out text, so the prefix stayed as it was found."
    return (
        f"{begin} took the {measure} of the quantized model on held-out text from {losses[0]} to "
        f"{losses[tuning.kept_step]} nats a token; the state after step {tuning.kept_step} was kept."
    )


def cache_sentence(report: Report) -> str:
    """Say what an INT8 cache costs in perplexity and saves in bytes; empty where the cache is in floating point."""
    cache = report.kv_cache
    if cache is None:
        return ""
    found = report.perplexity.quantized_prefix if report.perplexity else None
    after, before = perplexity(found), perplexity(cache.float_perplexity)
    cost = f"perplexity {before} with a floating-point cache, {after} with this one"
    if found is not None and cache.float_perplexity is not None:
        cost += f" ({percent(found / cache.float_perplexity - 1)})"
    scales = "one scale per head" if cache.scales == "per-head" else "one scale per tensor"
    prefix = ""
    if has_prefix(report):
        prefix = ", the prefix quantized too" if cache.with_prefix else ", the prefix in floating point"
    return (
        f"INT8, {scales}{prefix}: {cost}; {size(cache.bytes_a_token)} a token "
        f"against {size(cache.float32_bytes_a_token)} in float32."
    )


def fused_attention_sentence(report: Report, engine: Engine) -> str:
    """Say how many attentions of a plan with an INT8 cache are fused; empty where there is nothing to say.

    ONNX Runtime fuses none of them on the CPU, whatever the cache.
    """
    if report.kv_cache is None or engine.engine.startswith("onnxruntime"):
        return ""
    fused, layers = engine.fused_attention, report.model.layers
    if fused >= layers:
        return f"all {layers} attentions are fused kernels, with the INT8 cache too"
    return (
        f"{fused} of {layers} attentions are fused kernels with the INT8 cache; "
        "build with export.kv_cache=float to see whether a floating-point cache keeps more"
    )


def failed_checks(report: Report) -> list[ParityRow]:
    """Return the parity checks that do not hold, in ladder order."""
    return [row for row in report.parity if not row.passed]


def check_words(row: ParityRow) -> str:
    """Return one check as words: ``max |Δlogit| 0.0031, at most 0.002``."""
    value, limit = value_and_limit(row.value, row.limit)
    return f"{one_line(row.metric)} {value}, {row.direction} {limit}"


def parity_sentence(report: Report) -> str:
    """Say how many checks of the ladder hold, and where the first one that does not diverges."""
    if not report.parity:
        return "The parity ladder was not run, so nothing here proves that the engine computes what the model computes."
    failed = failed_checks(report)
    if not failed:
        total = len(report.parity)
        return f"All {total} parity checks hold." if total > 1 else "The one parity check holds."
    first = failed[0]
    site = next((row.site for row in failed if row.site), None)
    where = f" First diverging Site: {one_line(site)}." if site else " No diverging Site was named."
    return (
        f"{len(failed)} of {plural(len(report.parity), 'parity check')} {'fails' if len(failed) == 1 else 'fail'}, "
        f"first on rung '{one_line(first.rung)}': {check_words(first)}.{where}"
    )


def coverage(engine: Engine) -> str:
    """Say how many of an engine's linears are in INT8; only an engine that ran is said to run them."""
    verb = "run" if engine.ran else "are compiled"
    return f"of {engine.linears:,} linears, {engine.int8_linears:,} {verb} in INT8"


def not_run_words(engine: Engine) -> str:
    """Return ``not run: <why>`` for an engine that was not executed here."""
    return f"not run: {one_line(engine.note) or 'no reason was recorded'}"


def engines_sentence(report: Report) -> str:
    """Say which engines were compiled and which of them were executed here."""
    if not report.engines:
        return "No engine was compiled: the bundle holds the ONNX graph alone."
    ran = [one_line(e.engine) for e in report.engines if e.ran]
    idle = [one_line(e.engine) for e in report.engines if not e.ran]
    parts = []
    if ran:
        parts.append(f"{listing(ran)} {'was' if len(ran) == 1 else 'were'} compiled and run on this machine")
    if idle:
        parts.append(f"{listing(idle)} {'was' if len(idle) == 1 else 'were'} compiled but not run here")
    return "; ".join(parts) + "."
