"""The elements of a page. A report and a study are turned into these, and these into HTML or Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cushion_deploy.report.render.drawing import Drawing

SpanKind = Literal["code", "token", "quiet", "strong", "passed", "incomplete", "failed"]


@dataclass(frozen=True)
class Span:
    """Inline text that is displayed differently.

    Attributes:
        text: the text, not escaped.
        kind: ``code``; ``token``, displayed with its whitespace and control characters visible; ``quiet`` for
            secondary and ``strong`` for important text; otherwise a status.
    """

    text: str
    kind: SpanKind


Text: TypeAlias = "str | tuple[str | Span, ...]"
"""Inline text; every string in it is escaped by the renderers."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a ``note`` is secondary and set smaller."""

    text: Text
    note: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: column headings, all empty for a list of names and values; the first column names the rows.
        rows: as many cells each as there are headings. A row of a single cell is a heading for the rows below it.
        caption: what the table shows; empty for none.
        align: ``l`` or ``r`` for each column; by default the first is ``l`` and all others are ``r``.
        strong: indices of rows to highlight.
        strong_column: index of a column to highlight.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    caption: str = ""
    align: str = ""
    strong: frozenset[int] = frozenset()
    strong_column: int | None = None

    @property
    def alignment(self) -> str:
        """One letter per column."""
        return self.align or "l" + "r" * (len(self.head) - 1)

    def is_strong(self, row: int, column: int) -> bool:
        """Return whether a cell is highlighted; the heading of a group of rows always is."""
        return len(self.rows[row]) == 1 or row in self.strong or column == self.strong_column


@dataclass(frozen=True)
class Preformatted:
    """Text whose line breaks and spaces are kept; ``language`` is the info string of a Markdown code block."""

    text: str
    language: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure: embedded in HTML; in Markdown a link to ``<name>.svg`` beside the file."""

    name: str
    alt: str
    drawing: Drawing


@dataclass(frozen=True)
class Details:
    """Blocks that are hidden until the reader opens them."""

    summary: str
    blocks: tuple[Block, ...]


Block: TypeAlias = "Paragraph | Table | Preformatted | Figure | Details"


@dataclass(frozen=True)
class Section:
    """A part of a page; ``name`` is its anchor."""

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Fact:
    """A number for the strip below the headline, with what it counts and a remark."""

    label: str
    value: str
    remark: str


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: for the browser's tab.
        eyebrow: the line above the headline.
        headline: the result in one sentence.
        introduction: paragraphs below the headline.
        facts: the most important numbers.
        sections: the body.
        footer: where the numbers come from.
    """

    title: str
    eyebrow: Text
    headline: str
    introduction: tuple[Text, ...]
    facts: tuple[Fact, ...]
    sections: tuple[Section, ...]
    footer: str


def figure_if_drawn(figures: Mapping[str, Drawing], name: str, alt: str) -> tuple[Figure, ...]:
    """Return the figure of that name, or nothing if it was not drawn."""
    return (Figure(name, alt, figures[name]),) if name in figures else ()
