"""A study as a page: headline, most important numbers, one section for each table and figure, and provenance."""

from __future__ import annotations

import re
from collections.abc import Mapping

from cushion_deploy.report.provenance import environment_section, recipe_section
from cushion_deploy.report.render.drawing import Drawing
from cushion_deploy.report.render.elements import (
    Block,
    Details,
    Fact,
    Page,
    Paragraph,
    Section,
    Span,
    Table,
    Text,
    figure_if_drawn,
)
from cushion_deploy.report.render.formatting import date_time, duration, plural
from cushion_deploy.study.document import PARTS, Study
from cushion_deploy.study.paper import paper_source
from cushion_deploy.study.statements import headline, introduction, sentences
from cushion_deploy.study.tables import change, on, paper_table, tables


def study_page(study: Study, figures: Mapping[str, Drawing]) -> Page:
    """Return the page of a study; a figure that is missing from ``figures`` is left out."""
    shown = (part for part in PARTS if getattr(study, part) is not None or part in study.left_out)
    return Page(
        title=f"{headline(study)}: cushion-deploy study",
        eyebrow=f"Study · cushion-deploy {study.tool.version} · {date_time(study.created)}",
        headline=headline(study),
        introduction=tuple(_code_spans(text) for text in introduction(study)),
        facts=tuple(_facts(study)),
        sections=(
            *(_part(study, part, figures) for part in shown),
            _cells(study),
            recipe_section(study.recipe),
            environment_section(study.environment, study.model),
        ),
        footer=(
            f"Written by cushion-deploy {study.tool.version} from study.json (schema {study.schema_version}), which "
            f"contains every measured number on this page. The paper: {paper_source()}."
        ),
    )


def _part(study: Study, part: str, figures: Mapping[str, Drawing]) -> Section:
    left_out = part in study.left_out
    blocks: list[Block] = [Paragraph(_code_spans(text), note=left_out) for text in sentences(study, part)]
    blocks += tables(study, part)
    blocks += figure_if_drawn(figures, part, PARTS[part])
    published = paper_table(part)
    if published is not None and not left_out:
        blocks.append(Details("Numbers of the paper", (published,)))
    return Section(part, PARTS[part], tuple(blocks))


def _cells(study: Study) -> Section:
    rows = tuple((cell.name, duration(cell.seconds), "reused" if cell.reused else "computed") for cell in study.cells)
    text = (
        f"{plural(len(study.cells), 'measurement')}, {duration(_seconds(study))} in total. Each is stored in the work "
        "folder when it is made, so that an interrupted study continues where it stopped."
    )
    table = Table(("cell", "time", "result"), rows, align="lrl")
    return Section("cells", "Cells", (Paragraph(text), Details("Every cell", (table,))))


def _facts(study: Study) -> list[Fact]:
    facts = []
    deployed = next((pair for pair in study.table1 or () if pair.deployable), None)
    for text in study.texts:
        if deployed is not None:
            score = on(deployed.with_prefix or deployed.without, text)
            facts.append(Fact(f"Static W8A8, {text.title}", change(score, on(study.fp, text)), "perplexity over FP"))
    if study.table5 is not None and study.table5.with_prefix is not None:
        before, after = study.table5.without.top1, study.table5.with_prefix.top1
        facts.append(
            Fact("Input of the last block", f"{after:,.0f}", f"largest value; {before:,.0f} without the prefix")
        )
    facts.append(Fact("Cells", f"{len(study.cells)}", f"measured in {duration(_seconds(study))}"))
    return facts


def _seconds(study: Study) -> float:
    return sum(cell.seconds for cell in study.cells)


def _code_spans(text: str) -> Text:
    """Return a sentence with the text between backticks as code."""
    parts = re.split(r"`([^`]*)`", text)
    return tuple(Span(part, "code") if index % 2 else part for index, part in enumerate(parts) if part)
