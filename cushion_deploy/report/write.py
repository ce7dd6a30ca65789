"""Put the report into a folder: report.json, the page and the figures."""

from __future__ import annotations

from pathlib import Path

from cushion_deploy.report.document import REPORT_JSON, Report

REPORT_HTML = "report.html"


def write_report(report: Report, folder: Path) -> list[str]:
    """Write report.json, report.html and one PNG per figure; return the names written.

    A figure whose section the report lacks is not drawn. Nothing is written when a library is missing.

    Raises:
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    # Here, not above: reading and writing report.json alone must not need the extra.
    from cushion_deploy.report.figures import draw_figures
    from cushion_deploy.report.html import render_html

    figures = draw_figures(report)
    page = render_html(report, figures)
    folder.mkdir(parents=True, exist_ok=True)
    names = [*write_json(report, folder), REPORT_HTML]
    (folder / REPORT_HTML).write_text(page, encoding="utf-8", newline="\n")
    for name, drawing in figures.items():
        names.append(f"{name}.png")
        (folder / names[-1]).write_bytes(drawing.png)
    return names


def write_json(report: Report, folder: Path) -> list[str]:
    """Write report.json alone, which needs no extra; return its name in a list."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_JSON).write_text(report.to_text(), encoding="utf-8", newline="\n")
    return [REPORT_JSON]
