"""The sections of a report's page as blocks; one without data is empty or says what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from cushion_deploy.report import plans, scores, shipping, statements
from cushion_deploy.report.document import Engine, ParityRow, PlanType, Report
from cushion_deploy.report.document.prefix import Search, SearchStep, Tuning, TuningState
from cushion_deploy.report.provenance import json_block, names_and_values
from cushion_deploy.report.render.drawing import Drawing
from cushion_deploy.report.render.elements import (
    Block,
    Details,
    Paragraph,
    Preformatted,
    Span,
    Table,
    Text,
    figure_if_drawn,
)
from cushion_deploy.report.render.formatting import duration, listing, number, plural, size, value_and_limit

Blocks = list[Block]
Figures = Mapping[str, Drawing]
_USAGE = """\
# check every file against the manifest
cushion-deploy verify OUT
# generate text
cushion-deploy generate OUT "The harbour was quiet"
# run the parity ladder again on this machine
cushion-deploy parity OUT"""


def ship(report: Report) -> Blocks:
    """Return the answer to whether the bundle can ship, and what it rests on."""
    rows: tuple[tuple[Text, ...], ...] = tuple(
        (reason.name, (Span(reason.result, reason.status),), reason.sentence) for reason in shipping.reasons(report)
    )
    return [Paragraph((Span(shipping.answer(report), "strong"),)), Table(("", "", ""), rows, align="lll")]


def perplexity(report: Report, figures: Figures) -> Blocks:
    """Return the four columns, the engine, and what an INT8 cache costs."""
    measured = report.perplexity
    if measured is None:
        return [Paragraph("Perplexity was not measured.")]
    found = (*scores.perplexity_rows(measured), *scores.chat_rows(report.chat))
    rows = tuple((label, *cells) for label, cells in found)
    # Without a prefix to find, all columns are of the one model.
    last = statements.has_prefix(report) or not statements.found_prefix(report)
    engine = scores.engine_perplexity_sentence(measured, prefix=last)
    note = f"{engine} Measured on {scores.text_words(measured)}; calibration did not use this text. Lower is better."
    if statements.found_prefix(report) and not statements.same_columns(report):
        note += " The prefix alone changes perplexity, so the last column should be compared with FP + prefix."
    more = (scores.noise_sentence(measured), scores.later_sentence(measured), scores.chat_sentence(report.chat))
    note = " ".join((note, *filter(None, more)))
    cache = statements.cache_sentence(report)
    return [
        Table(("", *scores.COLUMNS), rows, strong_column=len(scores.COLUMNS) - (not last)),
        *figure_if_drawn(figures, "perplexity", "Bar chart of the measured perplexities, listed in the table above."),
        Paragraph(note, note=True),
        *([Paragraph(f"The key/value cache is {cache}")] if cache else []),
    ]


def prefix(report: Report) -> Blocks:
    """Return the tokens of the prefix, or why there is none."""
    blocks: Blocks = [Paragraph(statements.prefix_sentence(report))]
    found = report.search
    if found is not None and found.token_ids:
        rows = (
            (f"{position}", (Span(token, "token"),), f"{token_id}")
            for position, (token, token_id) in enumerate(zip(found.tokens, found.token_ids, strict=True))
        )
        blocks.append(Table(("position", "token", "id"), tuple(rows), align="lll"))
    if report.choice is not None and report.choice.candidates:
        blocks.append(Paragraph(statements.choice_sentence(report.choice)))
    if found is not None and (found.token_ids or found.steps):
        line_feed, space = Span("⏎", "code"), Span("␣", "code")
        begin = "Whitespace and control characters are shown as symbols: "
        blocks.append(Paragraph((begin, line_feed, " is a line feed, ", space, " is a space."), note=True))
    return blocks


def activations(report: Report, figures: Figures) -> Blocks:
    """Return activation magnitudes per layer."""
    if report.magnitudes is None:
        return []
    text = (
        f"{statements.magnitude_sentence(report.magnitudes)} One static scale per tensor must cover the largest "
        "value: the further it lies above the median, the fewer INT8 steps are left for typical values."
    )
    alt = "Largest, second, third and median activation magnitude per layer, without and with the prefix."
    return [Paragraph(text.strip()), *figure_if_drawn(figures, "magnitudes", alt)]


def search(report: Report) -> Blocks:
    """Return the steps of the prefix search and their best candidates."""
    if report.search is None:
        return [Paragraph("No search was run.")]
    blocks: Blocks = [Paragraph(_search_summary(report.search))]
    steps = report.search.steps
    if steps:
        head = ("step", "best token", "id", "source", "objective before", "after", "ratio", "decision")
        blocks.append(Table(head, tuple(_search_row(*step) for step in enumerate(steps, 1)), align="llrlrrrl"))
    for index, step in enumerate(steps, 1):
        if step.proposed:
            counts = ", ".join(f"{s} {n:,} ({step.finalists.get(s, 0):,})" for s, n in step.proposed.items())
            text = (
                f"Candidates of step {index}, with the number that was scored exactly in parentheses: {counts}. "
                "A token proposed by several sources counts for each."
            )
            if step.screened:
                text += f" The self-sink screen ran {step.screened:,} of {report.model.vocab_size:,} tokens."
            blocks.append(Paragraph(text, note=True))
    if report.search.rank_in_random_sample:
        ranks = ", then ".join(f"{r.rank:,} of {r.of:,}" for r in report.search.rank_in_random_sample)
        text = f"Compared with a random sample of the vocabulary, scored exactly, the chosen token ranks {ranks}."
        blocks.append(Paragraph(text, note=True))
    if report.search.averaging:
        blocks.append(Paragraph(statements.averaging_sentence(report.search.averaging)))
    blocks += [_candidates(*step) for step in enumerate(steps, 1) if step[1].top]
    return blocks


def _search_summary(found: Search) -> Text:
    text = (
        f": {plural(found.candidates_scored, 'candidate')} scored exactly in {duration(found.seconds)}. "
        f"The model processed {plural(found.positions_scored, 'position')}"
    )
    if found.positions_full_scan > found.positions_scored > 0:
        ratio = found.positions_full_scan / found.positions_scored
        text += f"; a full scan would need {found.positions_full_scan:,}, {ratio:,.0f} times as many"
    text += f". The search stopped because {found.stopped}.{' Seed:' if found.seed_tokens else ''}"
    seeds = [part for seed in found.seed_tokens for part in (" ", Span(str(seed), "token"))]
    objective = f" of {found.bits}-bit codes" if found.objective == "error" else ""
    return "Mode ", Span(found.mode, "code"), ", objective ", Span(found.objective, "code"), objective + text, *seeds


def _search_row(index: int, step: SearchStep) -> tuple[Text, ...]:
    before, after = number(step.objective_before, 4), number(step.objective_after, 4)
    decision = "kept" if step.accepted else "not worth a position"
    token = (Span(step.token, "token"),)
    return f"{index}", token, f"{step.token_id}", step.source, before, after, f"{step.ratio:.3f}", decision


def _candidates(index: int, step: SearchStep) -> Details:
    rows = tuple(((Span(c.token, "token"),), f"{c.token_id}", c.source, number(c.objective)) for c in step.top)
    table = Table(("token", "id", "source", "objective"), rows, align="lrlr")
    return Details(f"Best {plural(len(step.top), 'candidate')} of step {index}", (table,))


def tuning(report: Report) -> Blocks:
    """Return what tuning gained, and the loss at every evaluation."""
    found = report.tuning
    if found is None:
        return []
    losses = (f"held-out {found.loss} loss", "loss of the step", "quantization error, relative to untuned")
    more = ("held-out divergence", "from position 16 on", "held-out quantization error") if found.invisible else ()
    rows = tuple((_tuning_step(state, found.kept_step), *_tuning_row(state, found)) for state in found.states)
    return [
        Paragraph(f"{statements.tuning_sentence(found)} Tuning took {duration(found.seconds)}."),
        Details("Every evaluation on held-out text", (Table(("step", *more, *losses), rows),)),
    ]


def _tuning_step(state: TuningState, kept: int) -> str:
    return f"{state.step:,}{' (kept)' if state.step == kept else ''}"


def _tuning_row(state: TuningState, found: Tuning) -> tuple[str, ...]:
    def text(value: float | None, digits: int = 4) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    row = (text(state.held_out) or "not finite", text(state.prediction), text(state.error, 3))
    return (text(state.whole), text(state.later), text(state.held_out_error, 3), *row) if found.invisible else row


def parity(report: Report) -> Blocks:
    """Return the checks of the parity ladder, rung by rung."""
    blocks: Blocks = [Paragraph(statements.parity_sentence(report))]
    rows: list[tuple[Text, ...]] = []
    for rung, checks in groupby(report.parity, key=lambda row: row.rung):
        rows += [(rung,), *(_parity_row(row) for row in checks)]
    if rows:
        blocks.append(Table(("check", "value", "limit", "result"), tuple(rows), align="lrrl"))
    return blocks


def _parity_row(row: ParityRow) -> tuple[Text, ...]:
    value, limit = value_and_limit(row.value, row.limit)
    site = (" at ", Span(row.site, "code")) if row.site else ()
    note = (" ", Span(row.note, "quiet")) if row.note else ()
    result = Span("holds", "passed") if row.passed else Span("fails", "failed")
    return (row.metric, *site, *note), value, f"{'≤' if row.direction == 'at most' else '≥'} {limit}", (result,)


def engines(report: Report) -> Blocks:
    """Return the INT8 coverage of every engine, and whether it was run."""
    blocks: Blocks = [Paragraph(statements.engines_sentence(report))]
    if report.engines:
        rows = tuple(_engine_row(report, engine) for engine in report.engines)
        blocks.append(Table(("engine", "targets", "coverage", "on this machine"), rows, align="llll"))
    if report.plan_type is not None:
        blocks += _plan_type(report.plan_type)
    for engine in report.engines:
        if warning := plans.attention_warning(report, engine):
            blocks.append(Paragraph((Span(warning, "incomplete"),)))
        if fused := statements.fused_attention_sentence(report, engine):
            blocks.append(Paragraph(f"{engine.engine}: {fused}", note=True))
        if engine.details:
            blocks.append(Details(f"Details of {engine.engine}", (json_block(engine.details),)))
    return blocks


def _plan_type(found: PlanType) -> Blocks:
    """Return which type plans have and why, and the largest value in each part of the graph."""
    blocks: Blocks = [Paragraph(f"Floating-point type of plans: {plans.type_sentence(found)}")]
    if found.values:
        rows = tuple(
            ((Span(v.part, "code"),), v.tensor, number(v.value), (Span(v.token, "token"),), f"{v.position}")
            for v in found.values
        )
        table = Table(("part", "tensor", "largest magnitude", "token", "position"), rows, align="llrlr")
        note = f"Measured on {plural(found.tokens, 'token')} of {found.corpus}; -1 is in the prefix."
        blocks.append(Details("Largest value in each part of the graph", (Paragraph(note, note=True), table)))
    return blocks


def _engine_row(report: Report, engine: Engine) -> tuple[Text, ...]:
    covered = ", ".join(filter(None, (statements.coverage(engine), plans.attention_words(report, engine))))
    status = Span("run", "passed") if engine.ran else Span(statements.not_run_reason(engine), "incomplete")
    note = (" ", Span(engine.note, "quiet")) if engine.ran and engine.note else ()
    if engine.perplexity is not None:
        stderr = "" if engine.stderr is None else f" ± {engine.stderr:.2f}"
        note = (" ", Span(f"perplexity {engine.perplexity:.2f}{stderr}", "quiet"), *note)
    return engine.engine, ", ".join(engine.targets), covered, (status, *note)


def scales(report: Report, figures: Figures) -> Blocks:
    """Return the activation scales and how they were estimated."""
    found = report.calibration
    if found is None:
        return []
    text = f", estimated on {plural(found.tokens, 'token')} of {found.corpus}."
    if found.smoothing_alpha is not None:
        text += f" SmoothQuant with alpha {found.smoothing_alpha} is folded into the weights."
    if found.rotations:
        blocks = listing([f"{kind} in blocks of {block}" for kind, block in found.rotations.items()])
        text += f" Inputs are rotated: {blocks}."
    if found.window and found.sliding_window and found.window <= found.sliding_window:
        text += (
            f" The windows of {found.window:,} tokens do not reach beyond the model's sliding window of "
            f"{found.sliding_window:,}: what happens there was not observed."
        )
    begin = f"{plural(len(found.sites), 'static scale')}, range estimator "
    rows = tuple(((Span(e.site, "code"),), number(e.scale), number(e.amax)) for e in found.sites)
    alt = "Activation scale of every Site by layer, one line per kind of Site; the table below lists the values."
    return [
        Paragraph((begin, Span(found.estimator, "code"), text)),
        *figure_if_drawn(figures, "scales", alt),
        Details("Every scale", (Table(("Site", "scale", "largest magnitude"), rows),)),
    ]


def graph(report: Report) -> Blocks:
    """Return size, linears and rules of the exported graph."""
    e = report.export
    if e is None:
        return []
    bytes_text, linears = size(e.bytes), f"{e.linears:,}, packed into {e.packed_linears:,}"
    if e.float_bytes:
        share = 100 * e.bytes / e.float_bytes
        bytes_text += f", {share:.0f} % of the same graph in floating point ({size(e.float_bytes)})"
    if e.float_linears:
        verb = "stays" if e.float_linears == 1 else "stay"
        linears += f"; {e.float_linears:,} more {verb} in floating point, set by the recipe: {', '.join(e.float_sites)}"
    rules: list[tuple[str, Text]] = [("Rules checked", ", ".join(e.rules_checked))] if e.rules_checked else []
    head = "INT8" if e.quantize_head else "floating point"
    rows = [("Size", bytes_text), ("Linears", linears), ("Head", head), ("ONNX opset", f"{e.opset}"), *rules]
    return [names_and_values(rows)]


def time(report: Report, figures: Figures) -> Blocks:
    """Return the time of every stage."""
    if not report.stages:
        return []
    rows = tuple((s.stage, duration(s.seconds), "reused" if s.reused else "computed", s.ran_on) for s in report.stages)
    text = (
        f"This build took {duration(report.build_seconds)}. Outlined stages were reused from an earlier build and "
        "are not counted."
    )
    return [
        Paragraph(text),
        *figure_if_drawn(figures, "stages", "Bar chart of the seconds that each stage took."),
        Details("Every stage", (Table(("stage", "time", "result", "ran on"), rows, align="lrll"),)),
    ]


def usage() -> Blocks:
    """Return the commands to start with."""
    text = ("Replace ", Span("OUT", "code"), " with the folder that contains ", Span("cushion.json", "code"), ":")
    return [Paragraph(text), Preformatted(_USAGE, "sh")]
