"""A page as Markdown: every string escaped, figures linked as SVG files beside it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator

from cushion_deploy.printable import legible, one_line, visible
from cushion_deploy.report.render.elements import (
    Block,
    Details,
    Figure,
    Page,
    Paragraph,
    Preformatted,
    Span,
    Table,
    Text,
)


def render_markdown(page: Page) -> str:
    """Return the page as Markdown with the tables and ``<details>`` of GitHub."""
    return "\n".join(_page(page)).rstrip() + "\n"


def _page(page: Page) -> Iterator[str]:
    yield from (f"# {_inline(page.headline)}", "", _inline(page.eyebrow))
    for paragraph in page.introduction:
        yield from ("", _inline(paragraph))
    if page.facts:
        yield ""
        yield from (
            f"- {_inline(fact.label)}: **{_inline(fact.value)}**, {_inline(fact.remark)}" for fact in page.facts
        )
    for section in page.sections:
        yield from ("", f"## {_inline(section.title)}")
        yield from _blocks(section.blocks)
    yield from ("", _inline(page.footer))


def _blocks(blocks: Iterable[Block]) -> Iterator[str]:
    for block in blocks:
        yield ""
        match block:
            case Paragraph():
                yield _inline(block.text)
            case Table():
                yield from _table(block)
            case Preformatted():
                text = legible(block.text)
                # A fence must be longer than any run of backticks inside.
                fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
                yield from (fence + block.language, text, fence)
            case Figure():
                yield f"![{_inline(block.alt)}]({block.name}.svg)"
            case Details():
                yield f"<details><summary>{html.escape(one_line(block.summary))}</summary>"
                yield from _blocks(block.blocks)
                yield from ("", "</details>")


def _table(table: Table) -> Iterator[str]:
    if table.caption:
        yield from (f"**{_inline(table.caption)}**", "")
    yield "| " + " | ".join(_inline(title) for title in table.head) + " |"
    yield "| " + " | ".join("---:" if letter == "r" else "---" for letter in table.alignment) + " |"
    for index, row in enumerate(table.rows):
        cells = [
            f"**{_inline(cell)}**" if cell and table.is_strong(index, i) else _inline(cell)
            for i, cell in enumerate(row)
        ]
        yield "| " + " | ".join([*cells, *[""] * (len(table.head) - len(row))]) + " |"


def _inline(text: Text) -> str:
    spans = (text,) if isinstance(text, str) else text
    return "".join(_escape(span) if isinstance(span, str) else _span(span) for span in spans)


def _span(span: Span) -> str:
    if span.kind == "strong":
        return f"**{_escape(span.text)}**"
    if span.kind not in ("code", "token"):
        return _escape(span.text)
    text = visible(span.text) if span.kind == "token" else one_line(span.text)
    # No backtick can end the code, no vertical bar a cell.
    return "`" + text.replace("`", "‹U+0060›").replace("|", "\\|") + "`"


def _escape(text: str) -> str:
    """Return text whose characters have no meaning in Markdown."""
    return re.sub(r"([\\*_\[\]<>|#`])", r"\\\1", one_line(text))
