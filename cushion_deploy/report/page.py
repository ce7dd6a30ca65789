"""What every page of ours shares: a template environment that escapes all it shows, and one style sheet."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from cushion_deploy.report import wording
from cushion_deploy.report.extras import require


def render(package: str, filters: Mapping[str, Callable[..., Any]], context: Mapping[str, Any]) -> str:
    """Return the page that ``template.html.j2`` of a package makes of a context, with ``style`` added to it.

    Args:
        package: dotted name.
        filters: of the template, beside ``duration``, ``figure_uri`` and ``unbroken``.
        context: what the template shows; every string is escaped.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    jinja2 = require("jinja2")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Every string of a model or a file passes here, whatever part it comes from. Markup is a macro's output.
        finalize=lambda value: wording.legible(value) if type(value) is str else value,
    )
    environment.filters.update(
        {
            "duration": wording.duration,
            "figure_uri": lambda svg: "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii"),
            "unbroken": lambda text: text.replace(" %", "\u00a0%"),
            **filters,
        }
    )
    # The program's own file, not data: it must not be escaped.
    style = require("markupsafe").Markup(files("cushion_deploy.report").joinpath("page.css").read_text("utf-8"))
    source = files(package).joinpath("template.html.j2").read_text(encoding="utf-8")
    page: str = environment.from_string(source).render({**context, "style": style})
    return page
