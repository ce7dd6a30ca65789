"""The self-contained report page: no script, no network, every string from the report escaped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from cushion_deploy.report import findings, wording
from cushion_deploy.report.document import Perplexity, Report
from cushion_deploy.report.figures import Drawing
from cushion_deploy.report.page import render


def render_html(report: Report, figures: Mapping[str, Drawing]) -> str:
    """Return the page; a figure that is missing from ``figures`` is left out.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    filters: dict[str, Callable[..., Any]] = {
        "bytes_size": wording.size,
        "number": wording.number,
        "one_line": wording.one_line,
        "plural": wording.plural,
        "token_pieces": wording.token_pieces,
    }
    return render("cushion_deploy.report", filters, _context(report, figures))


def _context(report: Report, figures: Mapping[str, Drawing]) -> dict[str, Any]:
    """Gather what the template shows; every choice of words is made in ``findings`` and ``wording``."""
    outcome = findings.verdict(report)
    return {
        "report": report,
        "figures": figures,
        "name": wording.model_name(report.model.source),
        "parameters": wording.count(report.model.parameters),
        "created": report.created.strftime("%Y-%m-%d %H:%M %Z").strip(),
        "verdict": outcome,
        "facts": _facts(report),
        "perplexity_rows": findings.perplexity_rows(report.perplexity) if report.perplexity else [],
        "engine_sentence": _engine_perplexity(report.perplexity),
        "prefix_sentence": findings.prefix_sentence(report),
        "tuning_sentence": findings.tuning_sentence,
        "has_prefix": findings.has_prefix(report),
        "magnitude_sentence": _magnitudes(report),
        "parity_sentence": findings.parity_sentence(report),
        "ladder": [
            (rung, [(row, wording.value_and_limit(row.value, row.limit)) for row in rows])
            for rung, rows in groupby(report.parity, key=lambda row: row.rung)
        ],
        "engines_sentence": findings.engines_sentence(report),
        "coverage": findings.coverage,
        "cache_sentence": findings.cache_sentence(report),
        "fused_attention": {e.engine: findings.fused_attention_sentence(report, e) for e in report.engines},
        "not_run_words": findings.not_run_words,
        "total_seconds": sum(stage.seconds for stage in report.stages if not stage.reused),
        "recipe": json.dumps(report.recipe, indent=2, ensure_ascii=False),
        "as_json": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
    }


def _engine_perplexity(measured: Perplexity | None) -> str:
    if measured is None or measured.engine is None:
        return "Quantization is simulated in these columns; no compiled engine was measured."
    text = f"The compiled engine measures {wording.perplexity(measured.engine)}"
    if measured.quantized_prefix is not None:
        change = wording.percent(measured.engine / measured.quantized_prefix - 1)
        text += f", {change} against the simulated quantization of the last column"
    return text + "."


def _magnitudes(report: Report) -> str:
    """Say by how much the prefix lowers the largest activation."""
    if report.magnitudes is None or not report.magnitudes.without:
        return ""
    before = max(report.magnitudes.without, key=lambda entry: entry.top1)
    text = f"Without a prefix the largest activation is {before.top1:,.0f}, in layer {before.layer}"
    if not report.magnitudes.with_prefix:
        return text + "."
    after = max(report.magnitudes.with_prefix, key=lambda entry: entry.top1)
    return f"{text}; with the prefix it is {after.top1:,.0f}, in layer {after.layer}."


def _facts(report: Report) -> list[tuple[str, str, str]]:
    """Return the strip under the verdict as (name, value, remark)."""
    facts: list[tuple[str, str, str]] = []
    if report.parity:
        held = len(report.parity) - len(findings.failed_checks(report))
        facts.append(("Parity", f"{held} of {len(report.parity)}", "checks hold"))
    else:
        facts.append(("Parity", "not run", "nothing is proven"))
    for engine in report.engines[:2]:
        remark = wording.one_line(engine.engine)
        if engine.ran:
            facts.append(("INT8 linears", f"{engine.int8_linears:,} of {engine.linears:,}", remark))
        else:
            facts.append(
                ("INT8 linears, compiled", f"{engine.int8_linears:,} of {engine.linears:,}", f"{remark}, not run")
            )
    if report.export is not None:
        facts.append(
            ("Size", wording.size(report.export.bytes), f"{wording.size(report.export.float_bytes)} in floating point")
        )
    if report.stages:
        seconds = sum(stage.seconds for stage in report.stages if not stage.reused)
        reused = sum(stage.reused for stage in report.stages)
        remark = f"{wording.plural(reused, 'stage')} reused" if reused else "nothing reused"
        facts.append(("Build time", wording.duration(seconds), remark))
    return facts
