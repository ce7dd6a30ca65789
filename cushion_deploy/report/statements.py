"""The results of a report as sentences: the verdict, then magnitudes, prefix, cache, parity and engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cushion_deploy.printable import one_line
from cushion_deploy.report.document import Engine, ParityRow, Report
from cushion_deploy.report.document.measurements import Magnitudes
from cushion_deploy.report.document.prefix import Averaging, Choice, ChoiceCandidate, Tuning
from cushion_deploy.report.render.formatting import (
    listing,
    model_name,
    number,
    percent,
    perplexity,
    plural,
    size,
    value_and_limit,
    with_error,
)
from cushion_deploy.report.scores import excerpt_words

Status = Literal["passed", "incomplete", "failed"]
WITHOUT = "without prefix"
"""Name of the candidate without a prefix in a choice."""
UNTUNED = "with the untuned prefix"
"""Name of the candidate with the searched prefix where there is a tuned one."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of a build: ``failed`` if a parity check failed, ``incomplete`` if a measurement is missing."""

    status: Status
    sentence: str


def verdict(report: Report) -> Verdict:
    """Return the status and the one sentence that opens the page and ends the build."""
    sentence = _subject(report) + _cost(report)
    if failed := failed_checks(report):
        verb = "fails" if len(failed) == 1 else "fail"
        checks = plural(len(report.parity), "parity check")
        site = next((f" at {one_line(row.site)}" for row in failed if row.site), "")
        return Verdict("failed", f"Do not ship: {len(failed)} of {checks} {verb}{site}. {sentence}")
    measured = report.perplexity is not None and report.perplexity.quantized_prefix is not None
    complete = measured and bool(report.parity) and any(engine.ran for engine in report.engines)
    return Verdict("passed" if complete else "incomplete", sentence)


def _subject(report: Report) -> str:
    name, precision = model_name(report.model.source), one_line(report.precision).upper()
    if any(engine.ran for engine in report.engines):
        return f"{name} runs in static {precision}"
    if report.perplexity is None:
        return f"{name} in static {precision} was not run by any engine on this machine"
    return f"{name} in static {precision}, not run by any engine on this machine, is"


def _cost(report: Report) -> str:
    """Return what quantization costs in perplexity, with the prefix and without."""
    if report.perplexity is None:
        return "; its perplexity was not measured."
    p, part = report.perplexity, excerpt_words(report.perplexity)
    if not has_prefix(report):
        measured_behind = found_prefix(report) or p.quantized_prefix is None
        quantized = p.quantized if measured_behind else p.quantized_prefix
        return f"{_at(quantized, p.fp, 'FP')}{part}; {_why_no_prefix(report)}."
    if same_columns(report):
        return f"{_at(p.quantized_prefix, p.fp, 'FP')}{part}; its prefix{_tokens(report)} precedes every text anyway."
    after = _at(p.quantized_prefix, p.fp_prefix, "FP with the same prefix")
    if p.quantized is None or p.fp is None:
        return f"{after}{part}; without the prefix no finite perplexity was measured."
    without = percent(p.quantized / p.fp - 1)
    if p.quantized_prefix is not None and p.fp_prefix and percent(p.quantized_prefix / p.fp_prefix - 1) == without:
        without = "as much"
    return f"{after}; without the prefix it would be {without}{part}."


def same_columns(report: Report) -> bool:
    """Return whether the columns with the prefix are those without it: it is what precedes every text anyway."""
    p = report.perplexity
    return p is not None and (p.fp, p.quantized) == (p.fp_prefix, p.quantized_prefix)


def _tokens(report: Report) -> str:
    """Return the tokens of the prefix, to follow its name; empty without a search."""
    return f", {' '.join(one_line(token) for token in report.search.tokens)}," if report.search else ""


def _at(value: float | None, reference: float | None, name: str) -> str:
    if value is None or reference is None:
        return f" at a perplexity that cannot be compared with {name} (not finite or not measured)"
    change = value / reference - 1
    return f" at {percent(change)} perplexity {'over' if change >= 0 else 'relative to'} {name}"


def _why_no_prefix(report: Report) -> str:
    if report.search is None:
        return "it was built without a prefix"
    if found_prefix(report):
        return "it ships without a prefix, which does not pay"
    return "no prefix was needed: the search found no attention sink that justifies one"


def magnitude_sentence(magnitudes: Magnitudes) -> str:
    """State the largest activation without and with the prefix; empty if none was measured."""
    if not magnitudes.without:
        return ""
    before = max(magnitudes.without, key=lambda entry: entry.top1)
    text = f"Without a prefix the largest activation is {before.top1:,.0f}, in layer {before.layer}"
    if not magnitudes.with_prefix:
        return text + "."
    if magnitudes.with_prefix == magnitudes.without:
        return f"The largest activation is {before.top1:,.0f}, in layer {before.layer}, with and without the prefix."
    after = max(magnitudes.with_prefix, key=lambda entry: entry.top1)
    return f"{text}; with the prefix it is {after.top1:,.0f}, in layer {after.layer}."


def found_prefix(report: Report) -> bool:
    """Return whether the search found a prefix, with which the model was measured."""
    return report.search is not None and bool(report.search.token_ids)


def has_prefix(report: Report) -> bool:
    """Return whether the built model has a prefix: one was found, and it pays."""
    return found_prefix(report) and (report.choice is None or report.choice.shipped != WITHOUT)


def choice_sentence(choice: Choice) -> str:
    """State with which numbers the model was chosen that ships; empty if there was nothing to choose."""
    if not choice.candidates:
        return ""
    chats = f" and on {choice.answer_tokens:,} of answers in chats," if choice.answer_tokens else ""
    measure = "divergence" if choice.reason == "divergence" else "perplexity, because the divergences are too close,"
    return (
        f"Judged by its {measure} on {choice.tokens:,} predictions of text that was not calibrated on, from position "
        f"16 on,{chats} each with smoothing and scales of its own, the quantized model ships "
        f"{one_line(choice.shipped)}: "
        f"{listing([_candidate_words(row) for row in choice.candidates])}."
    )


def _candidate_words(row: ChoiceCandidate) -> str:
    answer = "" if row.answer is None else f", {_nats(row.answer)} in answers"
    return (
        f"{one_line(row.name)} {_nats(row.kl_after_16)} nats per token{answer} and perplexity "
        f"{perplexity(row.perplexity)}"
    )


def _nats(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def prefix_sentence(report: Report) -> str:
    """State how long the prefix is and what it does, or why there is none."""
    if report.search is None:
        return "No prefix search was run: the model was built without a prefix."
    length = len(report.search.token_ids)
    if length and not has_prefix(report):
        return (
            f"The search found a prefix of {plural(length, 'token')}, but the quantized model is closer to the "
            "original without it, so the model ships without a prefix."
        )
    if not length:
        return (
            "No prefix was needed. The search found no attention sink that justifies a prefix position, "
            "so the model runs unchanged."
        )
    return (
        f"The prefix is {plural(length, 'token')} long. "
        f"Its {'key and value are' if length == 1 else 'keys and values are'} constants in the graph, "
        "placed before every text. They act as the attention sink, so that no token of the text has to."
        f"{_averaged(report)}"
    )


def _averaged(report: Report) -> str:
    found = report.search
    if found is None or found.averaging is None or not found.averaging.kept:
        return ""
    mean = f"the mean over {first_tokens(found.averaging)}, each as the first one"
    if ships_tuned(report):
        return f" Tuning began with {mean}."
    each = "" if len(found.token_ids) == 1 else " at the first position"
    return f" Those{each} are {mean}."


def ships_tuned(report: Report) -> bool:
    """Return whether the prefix that ships was changed by tuning."""
    if report.tuning is None or not report.tuning.kept_step:
        return False
    return report.choice is None or report.choice.shipped != UNTUNED


def first_tokens(averaging: Averaging) -> str:
    """Say over which tokens a mean was taken."""
    chats = f", {averaging.chats:,} of them the one that every chat begins with" if averaging.chats else ""
    return f"{averaging.tokens:,} tokens{chats}"


def averaging_sentence(averaging: Averaging) -> str:
    """State what the mean at the first position changes, compared with the token that was found."""
    verdict = "kept" if averaging.kept else "not kept"
    return (
        f"The mean of {first_tokens(averaging)}, each as the first one, instead of the token found there, was "
        f"{verdict}: from position 16 on, the unquantized model behind it diverges from the original by "
        f"{_nats(averaging.averaged.later)} nats per token instead of {_nats(averaging.found.later)}, and the "
        f"objective is {number(averaging.averaged.error, 4)} instead of {number(averaging.found.error, 4)}, where "
        f"{averaging.slack:g} times as much is allowed."
    )


def tuning_sentence(tuning: Tuning) -> str:
    """State what tuning gained on the held-out text."""
    states = {state.step: state for state in tuning.states}
    what = "keys, values and activation scales" if tuning.scales_tuned else "keys and values"
    model = "unquantized" if tuning.invisible else "quantized"
    measure = "cross-entropy" if tuning.loss == "ce" else "divergence from the original model"
    steps = f"{plural(tuning.steps, 'step')} of tuning {what}"
    if tuning.skipped:
        steps += f" ({tuning.skipped} skipped because a gradient was not finite)"
    if tuning.kept_step == 0:
        beside = " without a larger quantization error" if tuning.invisible else ""
        return f"{steps} did not lower the {measure} on held-out text{beside}, so the untuned prefix was kept."
    before, after = states[0], states[tuning.kept_step]
    course, more = f"from {_loss(before.held_out)} to {_loss(after.held_out)} nats per token", ""
    if tuning.invisible:
        course = f"from {_loss(before.whole)} to {_loss(after.whole)} nats per token"
        if after.later is not None:
            course += f" (beyond its first 16 positions from {_loss(before.later)} to {_loss(after.later)})"
        if after.held_out_error is not None:
            more = f", with {after.held_out_error:.2f} times the quantization error"
        more += "; smoothing and scales were measured again behind it"
    return (
        f"{steps} changed the {model} model's {measure} on held-out text {course}; "
        f"the state after step {tuning.kept_step} was kept{more}."
    )


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def cache_sentence(report: Report) -> str:
    """State what an INT8 cache costs in perplexity and saves in bytes; empty for a floating-point cache."""
    cache = report.kv_cache
    if cache is None:
        return ""
    found = report.perplexity.quantized_prefix if report.perplexity else None
    error = report.perplexity.stderr.quantized_prefix if report.perplexity and report.perplexity.stderr else None
    after, before = with_error(found, error), with_error(cache.float_perplexity, cache.float_stderr)
    cost = f"perplexity {before} with a floating-point cache, {after} with this one"
    if found is not None and cache.float_perplexity is not None:
        cost += f" ({percent(found / cache.float_perplexity - 1)})"
    scales = "one scale per head" if cache.scales == "per-head" else "one scale per tensor"
    prefix = ""
    if found_prefix(report) and not has_prefix(report):
        cost += ", both behind the prefix"
    if has_prefix(report):
        prefix = ", the prefix quantized too" if cache.with_prefix else ", the prefix in floating point"
    return (
        f"INT8, {scales}{prefix}: {cost}; {size(cache.bytes_a_token)} per token, "
        f"compared with {size(cache.float32_bytes_a_token)} in float32."
    )


def fused_attention_sentence(report: Report, engine: Engine) -> str:
    """State how many attention layers of a plan with an INT8 cache are fused kernels; empty if not applicable.

    ONNX Runtime fuses none of them on the CPU, whatever the cache.
    """
    if report.kv_cache is None or engine.engine.startswith("onnxruntime"):
        return ""
    fused, layers = engine.fused_attention, report.model.layers
    if fused >= layers:
        return f"All {layers} attention layers are fused kernels, also with the INT8 cache."
    return (
        f"{fused} of {layers} attention layers are fused kernels with the INT8 cache; "
        "build with export.kv_cache=float to see whether a floating-point cache allows more."
    )


def failed_checks(report: Report) -> list[ParityRow]:
    """Return the parity checks that fail, in ladder order."""
    return [row for row in report.parity if not row.passed]


def check_summary(row: ParityRow) -> str:
    """Return the metric, value and limit of one check: ``max |Δlogit| 0.0031, at most 0.002``."""
    value, limit = value_and_limit(row.value, row.limit)
    return f"{one_line(row.metric)} {value}, {row.direction} {limit}"


def parity_sentence(report: Report) -> str:
    """State how many checks of the ladder hold, and where the first failure diverges."""
    if not report.parity:
        return "The parity ladder was not run, so nothing here shows that the engine computes what the model computes."
    failed = failed_checks(report)
    unchecked = "".join(f" Not checked: {one_line(sentence).rstrip('.')}." for sentence in report.unchecked)
    if not failed:
        total = len(report.parity)
        return (f"All {total} parity checks hold." if total > 1 else "The one parity check holds.") + unchecked
    first = failed[0]
    site = next((row.site for row in failed if row.site), None)
    where = f" First diverging Site: {one_line(site)}." if site else " No diverging Site was identified."
    return (
        f"{len(failed)} of {plural(len(report.parity), 'parity check')} {'fails' if len(failed) == 1 else 'fail'}, "
        f"first on rung '{one_line(first.rung)}': {check_summary(first)}.{where}{unchecked}"
    )


def coverage(engine: Engine) -> str:
    """State how many of an engine's linears are in INT8; they ``run`` only if the engine ran.

    Where INT8 is slower, state what they multiply instead; if the engine ran, also which nodes are not on the device.
    """
    if dtype := engine.details.get("float_products"):
        said = engine.details.get("remarks")
        if isinstance(said, list) and said:
            return one_line("; ".join(map(str, said)))
        return f"{engine.linears:,} linears multiply {one_line(str(dtype))} values of the INT8 codes"
    if engine.details.get("uncounted"):
        return f"INT8 is not counted in {engine.linears:,} linears"
    verb = "run" if engine.ran else "are compiled"
    return f"{engine.int8_linears:,} of {engine.linears:,} linears {verb} in INT8"


def not_run_reason(engine: Engine) -> str:
    """Return ``not run: <reason>`` for an engine that was not run on this machine."""
    return f"not run: {one_line(engine.note) or 'no reason was recorded'}"


def engines_sentence(report: Report) -> str:
    """State which engines were compiled, and which of them were run on this machine."""
    if not report.engines:
        return "No engine was compiled: the bundle contains only the ONNX graph."
    ran = [one_line(e.engine) for e in report.engines if e.ran]
    compiled = [one_line(e.engine) for e in report.engines if not e.ran]
    parts = []
    if ran:
        parts.append(f"{listing(ran)} {'was' if len(ran) == 1 else 'were'} compiled and run on this machine")
    if compiled:
        parts.append(f"{listing(compiled)} {'was' if len(compiled) == 1 else 'were'} compiled but not run here")
    return "; ".join(parts) + "."
