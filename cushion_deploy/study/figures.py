"""The figures of a study: perplexity of schemes and remedies, activation magnitudes and attention by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cushion_deploy.printable import one_line
from cushion_deploy.report.figures import magnitudes_figure
from cushion_deploy.report.render.axes import Series, category_figure, layer_panels, legend, log_ticks
from cushion_deploy.report.render.drawing import WIDE_LIGHT, Canvas, Drawing, Painter, draw
from cushion_deploy.study.document import Attention, LayerAttention, Score, Study
from cushion_deploy.study.tables import on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIR, STEP = ("without prefix", "with prefix"), ("static W8A8", "FP with the same prefix")
Row = tuple[str, float | None, float | None]
"""A label with two values on the same axis; None for a missing value."""


def points_figure(
    rows: Sequence[Row], names: tuple[str, str], references: Sequence[tuple[str, float]], canvas: Canvas = WIDE_LIGHT
) -> Figure:
    """Draw two connected points per row on a log axis, and references as vertical lines."""
    theme = canvas.theme
    with category_figure(canvas, [one_line(label) for label, _, _ in rows], margin=1.0, step=0.32) as (figure, axes):
        axes.set_xscale("log")
        for position, (_, first, second) in enumerate(rows):
            if first is not None and second is not None:
                axes.plot([first, second], [position, position], color=theme.grid, linewidth=2.5, zorder=1)
        for index, (name, marker) in enumerate(zip(names, "so", strict=True)):
            column = enumerate(row[1 + index] for row in rows)
            known = [(value, position) for position, value in column if isinstance(value, float)]
            values, positions = [value for value, _ in known], [position for _, position in known]
            axes.scatter(values, positions, s=46, marker=marker, color=theme.series[1 - index], label=name, zorder=3)
        for index, (name, value) in enumerate(references):
            axes.axvline(value, color=theme.muted, linewidth=1, linestyle=("--", ":")[index % 2], label=name, zorder=0)
        log_ticks(axes.xaxis)
        # Right-aligned, the label has room to the left on a narrow canvas.
        axes.set_xlabel("perplexity, log scale (lower is better)", loc="right" if canvas.narrow else "center")
        legend(figure, axes, 2 if canvas.narrow else 4)
    return figure


def attention_figure(found: Attention, canvas: Canvas = WIDE_LIGHT) -> Figure:
    """Draw the shares of attention per layer, without and with the prefix, from 0 to 100 %."""

    def series(layers: Sequence[LayerAttention]) -> list[Series]:
        return [
            ("on the prefix", [100 * entry.prefix for entry in layers]),
            ("on the first token", [100 * entry.first for entry in layers]),
            ("on all other tokens", [100 * entry.rest for entry in layers]),
        ]

    panels = [
        (title, [entry.layer for entry in layers], series(layers))
        for title, layers in (("without prefix", found.without), ("with prefix", found.with_prefix))
    ]
    return layer_panels(canvas, panels, "share of attention, %", height=3.3, limits=(-3, 103))


def draw_figures(study: Study) -> dict[str, Drawing]:
    """Return the figures of the parts that the study has, by name of the part.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    painters: dict[str, Painter] = {}
    figure2, figure3 = study.figure2, study.figure3
    if study.texts:
        text = study.texts[0]
        fp, fp_prefix = on(study.fp, text), on(study.fp_prefix, text)
        for name, pairs in (("table1", study.table1), ("table4", study.table4)):
            if pairs:
                rows = [(pair.label, on(pair.without, text), on(pair.with_prefix, text)) for pair in pairs]
                painters[name] = _painter(rows, PAIR, [("FP", fp), ("FP + prefix", fp_prefix)])
        for name, steps in (("table3", study.table3), ("remedies", study.remedies)):
            if steps:
                rows = [(step.label, on(step.scores, text), on(step.fp, text)) for step in steps]
                painters[name] = _painter(rows, STEP, [("FP, no prefix", fp)])
    if figure2 is not None and figure2.without:
        painters["figure2"] = lambda canvas: magnitudes_figure(figure2, canvas)
    if figure3 is not None and figure3.without:
        painters["figure3"] = lambda canvas: attention_figure(figure3, canvas)
    return {name: draw(painter) for name, painter in painters.items()}


def _painter(
    rows: Sequence[tuple[str, Score | None, Score | None]],
    names: tuple[str, str],
    references: Sequence[tuple[str, Score | None]],
) -> Painter:
    values = [(label, _value(first), _value(second)) for label, first, second in rows]
    known = [(name, value) for name, score in references if (value := _value(score)) is not None]
    return lambda canvas: points_figure(values, names, known, canvas)


def _value(score: Score | None) -> float | None:
    return None if score is None else score.perplexity
