"""A report as a page: headline, most important numbers, and the order of the sections."""

from __future__ import annotations

from collections.abc import Mapping

from cushion_deploy.printable import one_line
from cushion_deploy.report import sections
from cushion_deploy.report.document import Report
from cushion_deploy.report.provenance import environment_section, recipe_section
from cushion_deploy.report.render.drawing import Drawing
from cushion_deploy.report.render.elements import Fact, Page, Section, Span
from cushion_deploy.report.render.formatting import count, date_time, duration, model_name, plural, size
from cushion_deploy.report.shipping import QUESTION
from cushion_deploy.report.statements import failed_checks, verdict

_STATUS = {"passed": "Ready to ship", "incomplete": "Not proven", "failed": "Do not ship"}


def report_page(report: Report, figures: Mapping[str, Drawing]) -> Page:
    """Return the page of a report; a figure that is missing from ``figures`` is left out."""
    m, outcome = report.model, verdict(report)
    parts = (
        ("ship", QUESTION, sections.ship(report)),
        ("perplexity", "Perplexity", sections.perplexity(report, figures)),
        ("prefix", "Prefix", sections.prefix(report)),
        ("magnitudes", "Activations", sections.activations(report, figures)),
        ("search", "Prefix search", sections.search(report)),
        ("tuning", "Tuning", sections.tuning(report)),
        ("parity", "Parity", sections.parity(report)),
        ("engines", "Engines", sections.engines(report)),
        ("scales", "Scales", sections.scales(report, figures)),
        ("graph", "Graph", sections.graph(report)),
        ("time", "Time", sections.time(report, figures)),
        ("use", "Using the bundle", sections.usage()),
    )
    return Page(
        title=f"{model_name(m.source)}, static {one_line(report.precision).upper()}: cushion-deploy report",
        eyebrow=(
            Span(_STATUS[outcome.status], outcome.status),
            f" · cushion-deploy {report.tool.version} · {date_time(report.created)}",
        ),
        headline=outcome.sentence,
        introduction=(
            f"{m.source}: {count(m.parameters)} parameters, {m.family} family, {plural(m.layers, 'layer')} of width "
            f"{m.hidden_size:,}, {plural(m.heads, 'attention head')} over {plural(m.kv_heads, 'key/value head')}, "
            f"{plural(m.vocab_size, 'vocabulary token')}.",
        ),
        facts=tuple(_facts(report)),
        sections=(
            *(Section(name, title, tuple(blocks)) for name, title, blocks in parts if blocks),
            recipe_section(report.recipe),
            environment_section(report.environment, m),
        ),
        footer=(
            f"Written by cushion-deploy {report.tool.version} from report.json (schema {report.schema_version}), "
            "which contains every number on this page."
        ),
    )


def _facts(report: Report) -> list[Fact]:
    facts = []
    if report.parity:
        passed = len(report.parity) - len(failed_checks(report))
        facts.append(Fact("Parity", f"{passed} of {len(report.parity)}", "checks hold"))
    else:
        facts.append(Fact("Parity", "not run", "nothing was checked"))
    for engine in [each for each in report.engines if not {"float_products", "uncounted"} & each.details.keys()][:2]:
        name = one_line(engine.engine)
        label, remark = ("INT8 linears", name) if engine.ran else ("INT8 linears, compiled", f"{name}, not run")
        facts.append(Fact(label, f"{engine.int8_linears:,} of {engine.linears:,}", remark))
    if report.export is not None:
        facts.append(Fact("Size", size(report.export.bytes), f"{size(report.export.float_bytes)} in floating point"))
    if report.stages:
        reused = sum(stage.reused for stage in report.stages)
        remark = f"{plural(reused, 'stage')} reused" if reused else "no stage reused"
        facts.append(Fact("Build time", duration(report.build_seconds), remark))
    return facts
