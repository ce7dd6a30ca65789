"""A study as Markdown: headings, prose, tables and figures, every string of the model or a file made harmless."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator

from cushion_deploy.report.wording import one_line
from cushion_deploy.study.document import PARTS, Study
from cushion_deploy.study.paper import paper_source
from cushion_deploy.study.prose import headline, introduction, sentences
from cushion_deploy.study.tables import Table, paper_table, tables

_CODE = re.compile(r"(`[^`]*`)")


def render_markdown(study: Study, figures: Collection[str] = ()) -> str:
    """Return the study as Markdown; ``figures`` names the parts whose figure lies beside it as ``<part>.svg``."""
    return "\n".join(_lines(study, figures)).rstrip() + "\n"


def _lines(study: Study, figures: Collection[str]) -> Iterator[str]:
    yield f"# {_text(headline(study))}"
    yield ""
    yield _text(" ".join(introduction(study)))
    for part, title in PARTS.items():
        if getattr(study, part) is None and part not in study.left_out:
            continue
        yield from ("", f"## {title}", "", _text(" ".join(sentences(study, part))))
        for table in tables(study, part):
            yield from _table(table)
        if part in figures:
            yield from ("", f"![{title}]({part}.svg)")
        printed = paper_table(part)
        if printed and part not in study.left_out:
            yield from _table(printed)
    yield from ("", "## How it was made", "", "Every setting, with paths on that machine reduced to names:", "")
    yield from ("```json", json.dumps(study.recipe, indent=1).replace("`", "\\u0060"), "```")
    computed = sum(cell.seconds for cell in study.cells)
    yield from ("", f"{len(study.cells)} cells, {computed:,.0f} s of measuring. The paper: {_text(paper_source())}.")


def _table(table: Table) -> Iterator[str]:
    yield from ("", f"**{_text(table.caption)}**", "")
    yield "| " + " | ".join(_text(cell) for cell in table.head) + " |"
    yield "| --- |" + " ---: |" * (len(table.head) - 1)
    for index, row in enumerate(table.rows):
        mark = "**" if index in table.strong else ""
        yield "| " + " | ".join(f"{mark}{_text(cell)}{mark}" if cell else "" for cell in row) + " |"


def _text(text: str) -> str:
    """Return text whose characters mean themselves in Markdown; what stands between backticks stays code."""
    parts = _CODE.split(one_line(text))
    return "".join(
        part.replace("|", "\\|")
        if part.startswith("`") and len(part) > 1
        else re.sub(r"([\\*_\[\]<>|#`])", r"\\\1", part)
        for part in parts
    )
