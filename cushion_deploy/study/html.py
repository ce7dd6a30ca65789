"""A study as one self-contained page in the look of the build report: no script, no network, strings escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cushion_deploy.report import wording
from cushion_deploy.report.figures import Drawing
from cushion_deploy.report.page import render
from cushion_deploy.study.document import PARTS, Study
from cushion_deploy.study.paper import paper_source
from cushion_deploy.study.prose import headline, introduction, sentences
from cushion_deploy.study.tables import change, on, paper_table, tables


def render_html(study: Study, figures: Mapping[str, Drawing]) -> str:
    """Return the page; a figure that is missing from ``figures`` is left out.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    filters = {"pieces": lambda text: [part for part in re.split(r"(`[^`]*`)", text) if part]}
    return render("cushion_deploy.study", filters, _context(study, figures))


def _context(study: Study, figures: Mapping[str, Drawing]) -> dict[str, Any]:
    shown = [part for part in PARTS if getattr(study, part) is not None or part in study.left_out]
    return {
        "study": study,
        "figures": figures,
        "headline": headline(study),
        "introduction": introduction(study),
        "created": study.created.strftime("%Y-%m-%d %H:%M %Z").strip(),
        "facts": _facts(study),
        "parts": [
            {
                "name": part,
                "title": PARTS[part],
                "left_out": part in study.left_out,
                "sentences": sentences(study, part),
                "tables": tables(study, part),
                "paper": None if part in study.left_out else paper_table(part),
            }
            for part in shown
        ],
        "source": paper_source(),
        "recipe": json.dumps(study.recipe, indent=2, ensure_ascii=False),
        "seconds": sum(cell.seconds for cell in study.cells),
    }


def _facts(study: Study) -> list[tuple[str, str, str]]:
    """Return the strip under the headline as (name, value, remark)."""
    facts: list[tuple[str, str, str]] = []
    deployed = next((pair for pair in study.table1 or () if pair.deployable), None)
    for text in study.texts:
        if deployed is not None:
            score = on(deployed.with_prefix or deployed.without, text.name)
            facts.append((f"Static W8A8, {text.name}", change(score, on(study.fp, text.name)), "perplexity over FP"))
    if study.table5 is not None and study.table5.with_prefix is not None:
        before, after = study.table5.without.top1, study.table5.with_prefix.top1
        facts.append(("Into the last block", f"{after:,.0f}", f"largest value, {before:,.0f} without the prefix"))
    facts.append(
        ("Cells", f"{len(study.cells)}", f"measured in {wording.duration(sum(c.seconds for c in study.cells))}")
    )
    return facts
