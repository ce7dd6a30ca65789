"""Axes, ticks, lines and legends that all figures share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cushion_deploy.report.render.drawing import Canvas, new_figure, settings
from cushion_deploy.report.render.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_MARKERS = "os^Dv"

Series = tuple[str, Sequence[float]]
"""A label with one value per layer."""


def layer_panels(
    canvas: Canvas,
    panels: Sequence[tuple[str, Sequence[int], Sequence[Series]]],
    label: str,
    height: float,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw panels of lines over layers, side by side on a wide canvas.

    Args:
        canvas: what to draw on.
        panels: title, layers and series of each panel.
        label: of the shared vertical axis.
        height: of a wide figure, in inches.
        limits: of the vertical axis; None for a log axis with limits from the data.
    """
    with settings(canvas.theme):
        figure = new_figure(canvas, 5.6 if canvas.narrow else height)
        rows, columns = (len(panels), 1) if canvas.narrow else (1, len(panels))
        drawn = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for axes, (title, layers, series) in zip(drawn, panels, strict=True):
            plain_axes(axes, canvas, title)
            if limits is None:
                axes.set_yscale("log")
            for index, (name, values) in enumerate(series):
                line(axes, canvas, index, name, layers, values)
            if limits is not None:
                axes.set_ylim(*limits)
            layer_ticks(axes)
            if axes is drawn[-1] or not canvas.narrow:
                axes.set_xlabel("layer")
            if axes is drawn[0] or canvas.narrow:
                axes.set_ylabel(label)
        if limits is None:
            log_ticks(drawn[0].yaxis)
        legend(figure, drawn[0], 2 if canvas.narrow else len(panels[0][2]))
    return figure


def legend(figure: Figure, axes: Axes, columns: int) -> None:
    """Place the legend of ``axes`` above the figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def plain_axes(axes: Axes, canvas: Canvas, title: str = "") -> None:
    """Reduce the frame to a base line, a light grid and ticks without marks."""
    theme = canvas.theme
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=theme.muted, linewidth=0.7)
    axes.grid(axis="y", color=theme.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, colors=theme.muted, labelsize=9)
    axes.xaxis.label.set_color(theme.muted)
    axes.yaxis.label.set_color(theme.muted)
    if title:
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=theme.ink)


def line(axes: Axes, canvas: Canvas, index: int, label: str, x: Sequence[float], y: Sequence[float]) -> None:
    """Draw the ``index``-th series of a figure over layers."""
    colours = canvas.theme.series
    axes.plot(
        x,
        y,
        label=label,
        color=colours[index % len(colours)],
        marker=_MARKERS[index % len(_MARKERS)],
        markersize=3.4,
        linewidth=1.5,
        # Dashes distinguish the second round through the colours.
        linestyle="-" if index < len(colours) else "--",
    )


def log_ticks(axis: Axis) -> None:
    """Label a log axis with plain numbers: the decades, or also 2 and 5 where the axis covers few of them."""
    ticker = import_extra("matplotlib.ticker")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(ticker.LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))


def layer_ticks(axes: Axes) -> None:
    """Number layers with integers only."""
    axes.xaxis.set_major_locator(import_extra("matplotlib.ticker").MaxNLocator(integer=True, nbins=8))


@contextmanager
def category_figure(canvas: Canvas, labels: Sequence[str], margin: float, step: float) -> Iterator[tuple[Figure, Axes]]:
    """Return a figure with one row per label, the first on top; its theme holds until the block ends.

    Args:
        canvas: what to draw on.
        labels: names of the rows.
        margin, step: height of the figure without rows and of one row, in inches.
    """
    with settings(canvas.theme):
        figure = new_figure(canvas, margin + step * max(len(labels), 1))
        axes = figure.subplots()
        plain_axes(axes, canvas)
        yield figure, axes
        axes.set_yticks(list(range(len(labels))), labels=list(labels))
        axes.tick_params(axis="y", labelcolor=canvas.theme.ink)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color=canvas.theme.grid, linewidth=0.7)


def value_label(axes: Axes, canvas: Canvas, x: float, y: float, text: str) -> None:
    """Write a value to the right of its bar or point."""
    axes.annotate(
        text, (x, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9, color=canvas.theme.ink
    )
