"""The figures of a study: perplexity of schemes and remedies, activation magnitudes and attention by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cushion_deploy.report.figures import magnitudes_figure
from cushion_deploy.report.render.axes import Series, category_axis, layer_panels, legend, log_ticks, plain_axes
from cushion_deploy.report.render.drawing import WIDE_LIGHT, Canvas, Drawing, Painter, draw, new_figure, settings
from cushion_deploy.report.render.printable import one_line
from cushion_deploy.study.document import Attention, LayerAttention, Pair, Score, Step, Study
from cushion_deploy.study.tables import on

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = tuple[str, float | None, float | None]
"""A label with two values on the same axis; None for a missing value."""


def points_figure(
    rows: Sequence[Row], names: tuple[str, str], references: Sequence[tuple[str, float]], canvas: Canvas = WIDE_LIGHT
) -> Figure:
    """Draw two connected points per row on a log axis, and references as vertical lines."""
    theme = canvas.theme
    with settings(theme):
        figure = new_figure(canvas, 1.0 + 0.32 * max(len(rows), 1))
        axes = figure.subplots()
        plain_axes(axes, canvas)
        axes.set_xscale("log")
        for position, (_, first, second) in enumerate(rows):
            if first is not None and second is not None:
                axes.plot([first, second], [position, position], color=theme.grid, linewidth=2.5, zorder=1)
        for index, (name, marker) in enumerate(zip(names, "so", strict=True)):
            values = [row[1 + index] for row in rows]
            known = [(value, position) for position, value in enumerate(values) if isinstance(value, float)]
            axes.scatter(
                [value for value, _ in known],
                [position for _, position in known],
                s=46,
                marker=marker,
                color=theme.series[1 - index],
                label=name,
                zorder=3,
            )
        for index, (name, value) in enumerate(references):
            axes.axvline(value, color=theme.muted, linewidth=1, linestyle=("--", ":")[index % 2], label=name, zorder=0)
        category_axis(axes, canvas, [one_line(label) for label, _, _ in rows])
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
        text = study.texts[0].name
        for name, pairs in (("table1", study.table1), ("table4", study.table4)):
            if pairs:
                painters[name] = _pairs_painter(pairs, study, text)
        for name, steps in (("table3", study.table3), ("remedies", study.remedies)):
            if steps:
                painters[name] = _steps_painter(steps, study, text)
    if figure2 is not None and figure2.without:
        painters["figure2"] = lambda canvas: magnitudes_figure(figure2, canvas)
    if figure3 is not None and figure3.without:
        painters["figure3"] = lambda canvas: attention_figure(figure3, canvas)
    return {name: draw(painter) for name, painter in painters.items()}


def _pairs_painter(pairs: Sequence[Pair], study: Study, text: str) -> Painter:
    rows = [(pair.label, _value(on(pair.without, text)), _value(on(pair.with_prefix, text))) for pair in pairs]
    references = _known([("FP", on(study.fp, text)), ("FP + prefix", on(study.fp_prefix, text))])
    return lambda canvas: points_figure(rows, ("without prefix", "with prefix"), references, canvas)


def _steps_painter(steps: Sequence[Step], study: Study, text: str) -> Painter:
    rows = [(step.label, _value(on(step.scores, text)), _value(on(step.fp, text))) for step in steps]
    references = _known([("FP, no prefix", on(study.fp, text))])
    return lambda canvas: points_figure(rows, ("static W8A8", "FP with the same prefix"), references, canvas)


def _known(scores: Sequence[tuple[str, Score | None]]) -> list[tuple[str, float]]:
    return [(name, value) for name, score in scores if (value := _value(score)) is not None]


def _value(score: Score | None) -> float | None:
    return None if score is None else score.perplexity
