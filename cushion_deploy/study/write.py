"""Write a study to a folder: study.json, study.md, study.html and every figure as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

from cushion_deploy.study.document import STUDY_JSON, Study

STUDY_HTML = "study.html"
STUDY_MARKDOWN = "study.md"


def write_study(study: Study, folder: Path) -> list[str]:
    """Write study.json and everything that is made from it; return the names written.

    Raises:
        MissingDependency: matplotlib or jinja2 is not installed.
    """
    # Imported here because reading study.json alone must not need the extra.
    from cushion_deploy.report.render.html import render_html
    from cushion_deploy.report.render.markdown import render_markdown
    from cushion_deploy.study.figures import draw_figures
    from cushion_deploy.study.page import study_page

    figures = draw_figures(study)
    page = study_page(study, figures)
    contents = {
        STUDY_JSON: study.to_text().encode(),
        STUDY_MARKDOWN: render_markdown(page).encode(),
        STUDY_HTML: render_html(page).encode(),
    }
    for name, drawing in figures.items():
        contents |= {f"{name}.png": drawing.png, f"{name}.svg": drawing.wide_light}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return list(contents)
