"""A page as Markdown: its structure, and text that cannot leave its place."""

import pytest

from cushion_deploy.report.render.elements import Page, Paragraph, Section, Span, Table
from cushion_deploy.report.render.markdown import render_markdown


def _page(*blocks: Paragraph | Table) -> Page:
    return Page("", "", "", (), (), (Section("s", "s", blocks),), "")


def test_every_element_is_written(page: Page) -> None:
    text = render_markdown(page)
    for part in (
        "# headline\n\nPassed today\n\nintroduction\n\n- label: **12 %**, of it\n",
        "## title of section\n",
        "\nremark\n",
        "**caption**\n\n| name | left | right |\n| --- | --- | ---: |\n| **group of rows** |  |  |\n",
        "| row one | 1 % | **`l⏎` holds** |\n",
        "<details><summary>summary &lt;b&gt;</summary>\n\n|  |  |\n| --- | --- |\n| key | value |\n",
        "\n![alternative](drawn.svg)\n\nfooter\n",
    ):
        assert part in text


def test_a_code_block_is_fenced_by_more_backticks_than_it_contains(page: Page) -> None:
    assert "\n````json\na\n```\nb\n````\n\n</details>" in render_markdown(page)


def test_code_can_end_neither_its_span_nor_a_cell(page: Page) -> None:
    assert "plain `code\\|‹U+0060›x`quiet" in render_markdown(page)


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("[a](javascript:x)", r"\[a\](javascript:x)"),
        ("<script>", r"\<script\>"),
        ("a|b", r"a\|b"),
        ("`a` *b* _c_", r"\`a\` \*b\* \_c\_"),
        ("line\n# break", r"line \# break"),
        ("\u202ea", "‹U+202E›a"),
    ],
)
def test_text_has_no_meaning_in_markdown(hostile: str, shown: str) -> None:
    lines = render_markdown(_page(Paragraph(hostile), Table(("x", "y"), ((hostile, (Span(hostile, "quiet"),)),))))
    assert lines.endswith(f"\n\n{shown}\n\n| x | y |\n| --- | ---: |\n| {shown} | {shown} |\n")
