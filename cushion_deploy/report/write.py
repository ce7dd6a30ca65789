"""Write a report to a folder: report.json, report.html and the figures as PNG."""

from __future__ import annotations

from pathlib import Path

from cushion_deploy.report.document import REPORT_JSON, Report

REPORT_HTML = "report.html"


def write_report(report: Report, folder: Path) -> list[str]:
    """Write report.json, report.html and one PNG per figure; return the names written.

    Figures of sections that the report does not have are not drawn. Nothing is written if a library is missing.

    Raises:
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    # Imported here because reading and writing report.json alone must not need the extra.
    from cushion_deploy.report.figures import draw_figures
    from cushion_deploy.report.page import report_page
    from cushion_deploy.report.render.html import render_html

    figures = draw_figures(report)
    html = render_html(report_page(report, figures))
    folder.mkdir(parents=True, exist_ok=True)
    names = [*write_json(report, folder), REPORT_HTML]
    (folder / REPORT_HTML).write_text(html, encoding="utf-8", newline="\n")
    for name, drawing in figures.items():
        names.append(f"{name}.png")
        (folder / names[-1]).write_bytes(drawing.png)
    return names


def write_json(report: Report, folder: Path) -> list[str]:
    """Write report.json alone, which needs no extra; return the names written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT_JSON).write_text(report.to_text(), encoding="utf-8", newline="\n")
    return [REPORT_JSON]
