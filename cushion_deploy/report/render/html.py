"""A page as one self-contained HTML file: no script, no network, every string escaped."""

from __future__ import annotations

import base64
from importlib.resources import files

from cushion_deploy.printable import legible, token_pieces
from cushion_deploy.report.render.elements import Page
from cushion_deploy.report.render.extras import import_extra


def render_html(page: Page) -> str:
    """Return the page as HTML.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    environment = import_extra("jinja2").Environment(
        autoescape=True,
        undefined=import_extra("jinja2").StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every string of a model or a file passes here, wherever it comes from. The output of a macro is Markup.
        finalize=lambda value: legible(value) if type(value) is str else value,
    )
    environment.filters.update(
        {
            "figure_uri": lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii"),
            "kind": lambda block: type(block).__name__.lower(),
            "spans": lambda text: (text,) if isinstance(text, str) else text,
            "token_pieces": token_pieces,
            "unbroken": lambda text: text.replace(" %", "\u00a0%"),
        }
    )
    folder = files("cushion_deploy.report.render")
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    html: str = template.render(page=page, style=folder.joinpath("page.css").read_text(encoding="utf-8"))
    return html
