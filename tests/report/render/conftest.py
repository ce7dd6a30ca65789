"""A page with every element."""

import pytest

from cushion_deploy.report.render.drawing import Drawing
from cushion_deploy.report.render.elements import (
    Details,
    Fact,
    Figure,
    Page,
    Paragraph,
    Preformatted,
    Section,
    Span,
    Table,
)

SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"


@pytest.fixture
def page() -> Page:
    """Return a page whose every string is found nowhere else on it."""
    table = Table(
        ("name", "left", "right"),
        (("group of rows",), ("row one", "1 %", (Span("l\n", "token"), " ", Span("holds", "passed")))),
        "caption",
        align="llr",
        strong_column=2,
    )
    blocks = (
        Paragraph(("plain ", Span("code|`x", "code"), Span("quiet", "quiet"))),
        Paragraph("remark", note=True),
        table,
        Details("summary <b>", (Table(("", ""), (("key", "value"),), align="ll"), Preformatted("a\n```\nb", "json"))),
        Figure("drawn", "alternative", Drawing(b"", SVG, SVG, SVG, SVG)),
    )
    facts = (Fact("label", "12 %", "of it"),)
    section = Section("anchor", "title of section", blocks)
    return Page("tab", (Span("Passed", "passed"), " today"), "headline", ("introduction",), facts, (section,), "footer")
