"""The sections of a report's page, one function each; a section that needs missing data is None or says so."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

from cushion_deploy.report import statements
from cushion_deploy.report.document import Engine, ParityRow, Report, Search, SearchStep
from cushion_deploy.report.provenance import json_block
from cushion_deploy.report.render.drawing import Drawing
from cushion_deploy.report.render.elements import (
    Block,
    Definitions,
    Details,
    Paragraph,
    Preformatted,
    Section,
    Span,
    Subheading,
    Table,
    Text,
    figure_if_drawn,
)
from cushion_deploy.report.render.formatting import duration, number, plural, sentence, size, value_and_limit

Figures = Mapping[str, Drawing]
_USAGE = """\
# check every file against the manifest
cushion-deploy verify OUT
# generate text
cushion-deploy generate OUT "The harbour was quiet"
# run the parity ladder again on this machine
cushion-deploy parity OUT"""


def perplexity_section(report: Report, figures: Figures) -> Section:
    """Return the four columns, the engine, and what an INT8 cache costs."""
    measured = report.perplexity
    if measured is None:
        return Section("perplexity", "Perplexity", (Paragraph("Perplexity was not measured."),))
    rows = tuple((label, *cells) for label, cells in statements.perplexity_rows(measured))
    note = (
        f"{statements.engine_perplexity_sentence(measured)} Measured on {measured.corpus}: "
        f"{plural(measured.tokens, 'token')} in windows of {measured.window:,}; calibration did not use this text. "
        "Lower is better."
    )
    if statements.has_prefix(report):
        note += " The prefix alone changes perplexity, so the last column should be compared with FP + prefix."
    blocks: list[Block] = [
        Table(("", *statements.COLUMNS), rows, strong_column=len(statements.COLUMNS)),
        *figure_if_drawn(figures, "perplexity", "Bar chart of the measured perplexities, listed in the table above."),
        Paragraph(note, note=True),
    ]
    if cache := statements.cache_sentence(report):
        blocks.append(Paragraph(f"The key/value cache is {cache}"))
    return Section("perplexity", "Perplexity", tuple(blocks))


def prefix_section(report: Report) -> Section:
    """Return the tokens of the prefix, or why there is none."""
    blocks: list[Block] = [Paragraph(statements.prefix_sentence(report))]
    search = report.search
    if search is not None and search.token_ids:
        pairs = enumerate(zip(search.tokens, search.token_ids, strict=True))
        rows = tuple((f"{position}", (Span(token, "token"),), f"{token_id}") for position, (token, token_id) in pairs)
        blocks.append(Table(("position", "token", "id"), rows, align="lll"))
    if search is not None and (search.token_ids or search.steps):
        symbols = (
            "Whitespace and control characters are shown as symbols: ",
            Span("⏎", "code"),
            " is a line feed, ",
            Span("␣", "code"),
            " is a space.",
        )
        blocks.append(Paragraph(symbols, note=True))
    return Section("prefix", "Prefix", tuple(blocks))


def activations_section(report: Report, figures: Figures) -> Section | None:
    """Return activation magnitudes per layer."""
    if report.magnitudes is None:
        return None
    text = (
        f"{statements.magnitude_sentence(report.magnitudes)} One static scale per tensor must cover the largest "
        "value: the further it lies above the median, the fewer INT8 steps are left for typical values."
    )
    alt = "Largest, second, third and median activation magnitude per layer, without and with the prefix."
    return Section("magnitudes", "Activations", (Paragraph(text.strip()), *figure_if_drawn(figures, "magnitudes", alt)))


def search_section(report: Report) -> Section:
    """Return the steps of the prefix search and their best candidates."""
    search = report.search
    if search is None:
        return Section("search", "Prefix search", (Paragraph("No search was run."),))
    steps = tuple(enumerate(search.steps, 1))
    blocks: list[Block] = [Paragraph(_search_summary(search))]
    if steps:
        head = ("step", "best token", "id", "source", "objective before", "after", "ratio", "decision")
        blocks.append(Table(head, tuple(_search_row(index, step) for index, step in steps), align="llrlrrrl"))
    for index, step in steps:
        if step.proposed:
            counts = (f"{s} {n:,} ({step.finalists.get(s, 0):,})" for s, n in step.proposed.items())
            text = (
                f"Candidates of step {index}, with the number that was scored exactly in parentheses: "
                f"{', '.join(counts)}. A token proposed by several sources counts for each."
            )
            blocks.append(Paragraph(text, note=True))
    if search.rank_in_random_sample:
        ranks = ", then ".join(f"{r.rank:,} of {r.of:,}" for r in search.rank_in_random_sample)
        text = f"Compared with a random sample of the vocabulary, scored exactly, the chosen token ranks {ranks}."
        blocks.append(Paragraph(text, note=True))
    for index, step in steps:
        if step.top:
            summary = f"Best {plural(len(step.top), 'candidate')} of step {index}"
            blocks.append(Details(summary, (_candidates_table(step),)))
    return Section("search", "Prefix search", tuple(blocks))


def _search_summary(search: Search) -> Text:
    text = (
        f": {plural(search.candidates_scored, 'candidate')} scored exactly in {duration(search.seconds)}. "
        f"The model processed {plural(search.positions_scored, 'position')}"
    )
    if search.positions_full_scan > search.positions_scored > 0:
        ratio = search.positions_full_scan / search.positions_scored
        text += f"; a full scan would need {search.positions_full_scan:,}, {ratio:,.0f} times as many"
    text += f". The search stopped because {search.stopped}."
    seeds = [part for seed in search.seed_tokens for part in (" ", Span(str(seed), "token"))]
    begin = ("Mode ", Span(search.mode, "code"), ", objective ", Span(search.objective, "code"))
    return (*begin, text, *((" Seed:", *seeds) if seeds else ()))


def _search_row(index: int, step: SearchStep) -> tuple[Text, ...]:
    return (
        f"{index}",
        (Span(step.token, "token"),),
        f"{step.token_id}",
        step.source,
        number(step.objective_before, 4),
        number(step.objective_after, 4),
        f"{step.ratio:.3f}",
        "kept" if step.accepted else "not worth a position",
    )


def _candidates_table(step: SearchStep) -> Table:
    rows = tuple(((Span(c.token, "token"),), f"{c.token_id}", c.source, number(c.objective)) for c in step.top)
    return Table(("token", "id", "source", "objective"), rows, align="lrlr")


def tuning_section(report: Report) -> Section | None:
    """Return what tuning gained, and the loss at every evaluation."""
    tuning = report.tuning
    if tuning is None:
        return None
    rows = tuple(
        (
            f"{state.step:,}{' (kept)' if state.step == tuning.kept_step else ''}",
            "not finite" if state.held_out is None else f"{state.held_out:.4f}",
            "" if state.prediction is None else f"{state.prediction:.4f}",
            "" if state.error is None else f"{state.error:.3f}",
        )
        for state in tuning.states
    )
    head = ("step", f"held-out {tuning.loss} loss", "loss of the step", "quantization error, relative to untuned")
    text = f"{statements.tuning_sentence(tuning)} Tuning took {duration(tuning.seconds)}."
    return Section(
        "tuning", "Tuning", (Paragraph(text), Details("Every evaluation on held-out text", (Table(head, rows),)))
    )


def parity_section(report: Report) -> Section:
    """Return the checks of the parity ladder, rung by rung."""
    blocks: list[Block] = [Paragraph(statements.parity_sentence(report))]
    if report.parity:
        rows: list[tuple[Text, ...]] = []
        for rung, checks in groupby(report.parity, key=lambda row: row.rung):
            rows += [(rung,), *(_parity_row(row) for row in checks)]
        blocks.append(Table(("check", "value", "limit", "result"), tuple(rows), align="lrrl"))
    return Section("parity", "Parity", tuple(blocks))


def _parity_row(row: ParityRow) -> tuple[Text, ...]:
    value, limit = value_and_limit(row.value, row.limit)
    site = (" at ", Span(row.site, "code")) if row.site else ()
    note = (" ", Span(row.note, "quiet")) if row.note else ()
    result = Span("holds", "passed") if row.passed else Span("fails", "failed")
    return (row.metric, *site, *note), value, f"{'≤' if row.direction == 'at most' else '≥'} {limit}", (result,)


def engines_section(report: Report) -> Section:
    """Return the INT8 coverage of every engine, and whether it was run."""
    blocks: list[Block] = [Paragraph(statements.engines_sentence(report))]
    for engine in report.engines:
        blocks.append(Subheading((f"{engine.engine} ", Span(f"({', '.join(engine.targets)})", "quiet"))))
        blocks.append(Paragraph(_engine_summary(engine)))
        if fused := statements.fused_attention_clause(report, engine):
            blocks.append(Paragraph(sentence(fused), note=True))
        if engine.details:
            blocks.append(Details("Engine details", (json_block(engine.details),)))
    return Section("engines", "Engines", tuple(blocks))


def _engine_summary(engine: Engine) -> Text:
    covered = statements.coverage(engine)
    if engine.fused_attention:
        covered += f", with {plural(engine.fused_attention, 'fused attention kernel')}"
    if not engine.ran:
        return sentence(covered), " ", Span(statements.not_run_reason(engine), "incomplete")
    note = (" ", Span(engine.note, "quiet")) if engine.note else ()
    return sentence(covered), " ", Span("run on this machine", "passed"), *note


def scales_section(report: Report, figures: Figures) -> Section | None:
    """Return the activation scales and how they were estimated."""
    calibration = report.calibration
    if calibration is None:
        return None
    found = f" estimated on {plural(calibration.tokens, 'token')} of {calibration.corpus}."
    if calibration.smoothing_alpha is not None:
        found += f" SmoothQuant with alpha {calibration.smoothing_alpha} is folded into the weights."
    text = (
        f"{plural(len(calibration.sites), 'static scale')}, range estimator ",
        Span(calibration.estimator, "code"),
        f",{found}",
    )
    rows = tuple(((Span(e.site, "code"),), number(e.scale), number(e.amax)) for e in calibration.sites)
    alt = "Activation scale of every Site by layer, one line per kind of Site; the table below lists the values."
    return Section(
        "scales",
        "Scales",
        (
            Paragraph(text),
            *figure_if_drawn(figures, "scales", alt),
            Details("Every scale", (Table(("Site", "scale", "largest magnitude"), rows),)),
        ),
    )


def graph_section(report: Report) -> Section | None:
    """Return size, linears and rules of the exported graph."""
    e = report.export
    if e is None:
        return None
    bytes_text, linears = size(e.bytes), f"{e.linears:,}, packed into {e.packed_linears:,}"
    if e.float_bytes:
        share = 100 * e.bytes / e.float_bytes
        bytes_text += f", {share:.0f} % of the same graph in floating point ({size(e.float_bytes)})"
    if e.float_linears:
        verb = "stays" if e.float_linears == 1 else "stay"
        linears += f"; {e.float_linears:,} more {verb} in floating point, set by the recipe: {', '.join(e.float_sites)}"
    entries: list[tuple[str, Text]] = [
        ("Size", bytes_text),
        ("Linears", linears),
        ("Head", "INT8" if e.quantize_head else "floating point"),
        ("ONNX opset", f"{e.opset}"),
    ]
    if e.rules_checked:
        entries.append(("Rules checked", ", ".join(e.rules_checked)))
    return Section("graph", "Graph", (Definitions(tuple(entries)),))


def time_section(report: Report, figures: Figures) -> Section | None:
    """Return the time of every stage."""
    if not report.stages:
        return None
    rows = tuple((s.stage, duration(s.seconds), "reused" if s.reused else "computed") for s in report.stages)
    text = (
        f"This build took {duration(report.build_seconds)}. Outlined stages were reused from an earlier build and "
        "are not counted."
    )
    return Section(
        "time",
        "Time",
        (
            Paragraph(text),
            *figure_if_drawn(figures, "stages", "Bar chart of the seconds that each stage took."),
            Details("Every stage", (Table(("stage", "time", "result"), rows, align="lrl"),)),
        ),
    )


def usage_section() -> Section:
    """Return the commands to start with."""
    text = ("Replace ", Span("OUT", "code"), " with the folder that contains ", Span("cushion.json", "code"), ":")
    return Section("use", "Using the bundle", (Paragraph(text), Preformatted(_USAGE, "sh")))
