"""The figures of a report: activation magnitudes, perplexity, scales and stage times."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cushion_deploy.printable import one_line
from cushion_deploy.report.document import Report, Stage
from cushion_deploy.report.document.measurements import Calibration, LayerMagnitude, Magnitudes, Perplexity
from cushion_deploy.report.render.axes import (
    Series,
    category_figure,
    layer_panels,
    layer_ticks,
    legend,
    line,
    log_ticks,
    plain_axes,
    value_label,
)
from cushion_deploy.report.render.drawing import WIDE_LIGHT, Canvas, Drawing, Painter, draw, new_figure, settings
from cushion_deploy.report.render.formatting import duration, perplexity
from cushion_deploy.report.statements import has_prefix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER_SITE = re.compile(r"layers\.(\d+)\.(.+)")
# Bars must begin at zero; beyond this ratio the short ones are invisible, so points on a log axis are drawn instead.
_LARGEST_BAR_RATIO = 12.0


def magnitudes_figure(magnitudes: Magnitudes, canvas: Canvas = WIDE_LIGHT) -> Figure:
    """Draw the top-1, top-2, top-3 and median magnitude per layer, without and with the prefix, on one log scale.

    If both are the same, because there is no prefix or it precedes every text anyway, they are drawn once.
    """

    def series(layers: Sequence[LayerMagnitude]) -> list[Series]:
        named = (
            ("largest", [entry.top1 for entry in layers]),
            ("second", [entry.top2 for entry in layers]),
            ("third", [entry.top3 for entry in layers]),
            ("median", [entry.median for entry in layers]),
        )
        # A log axis has no zero: such a point is left out.
        return [(name, [value if value > 0 else math.nan for value in values]) for name, values in named]

    sides = [("without prefix", magnitudes.without), ("with prefix", magnitudes.with_prefix)]
    if magnitudes.without == magnitudes.with_prefix:
        # The same picture twice would suggest a difference.
        sides = [("with and without prefix", magnitudes.without)]
    panels = [(title, [entry.layer for entry in layers], series(layers)) for title, layers in sides]
    return layer_panels(canvas, panels, "activation magnitude", height=3.5)


def perplexity_figure(measured: Perplexity, canvas: Canvas = WIDE_LIGHT, *, prefix: bool = True) -> Figure:
    """Draw the measured columns as bars from zero, or as points on a log scale if they differ too much for bars."""
    theme = canvas.theme
    columns = [
        ("FP", measured.fp, theme.muted),
        ("FP + prefix", measured.fp_prefix, theme.muted),
        ("quantized", measured.quantized, theme.series[1]),
        ("quantized + prefix", measured.quantized_prefix, theme.series[0]),
        ("engine + prefix" if prefix else "engine", measured.engine, theme.series[0]),
    ]
    # A prefix that precedes every text anyway changes nothing, so its columns would be the same bars again.
    if (measured.fp, measured.quantized) == (measured.fp_prefix, measured.quantized_prefix):
        columns = [columns[0], columns[2], ("engine", measured.engine, theme.series[0])]
    known = [(label, value, colour) for label, value, colour in columns if value is not None]
    labels, values, colours = [c[0] for c in known], [c[1] for c in known], [c[2] for c in known]
    positions = list(range(len(values)))
    logarithmic = bool(values) and max(values) > _LARGEST_BAR_RATIO * min(values)
    with category_figure(canvas, labels, margin=0.55, step=0.34) as (figure, axes):
        if logarithmic:
            axes.set_xscale("log")
            axes.scatter(values, positions, s=64, color=colours, zorder=3)
            axes.set_xlim(min(values) / 1.5, max(values) * (6 if canvas.narrow else 2))
            log_ticks(axes.xaxis)
        else:
            axes.barh(positions, values, height=0.62, color=colours)
            axes.set_xlim(0, max(values, default=1) * (1.25 if canvas.narrow else 1.1))
        for position, value in zip(positions, values, strict=True):
            value_label(axes, canvas, value, position, perplexity(value))
        axes.set_xlabel("perplexity, log scale (lower is better)" if logarithmic else "perplexity (lower is better)")
    return figure


def scales_figure(calibration: Calibration, canvas: Canvas = WIDE_LIGHT) -> Figure:
    """Draw the scale of every Site over its layer, one line per kind of Site; Sites outside layers are on the right."""
    kinds: dict[str, list[tuple[int, float]]] = {}
    others: list[tuple[str, float]] = []
    for entry in calibration.sites:
        match = _LAYER_SITE.fullmatch(entry.site)
        if match:
            kinds.setdefault(match[2], []).append((int(match[1]), entry.scale))
        else:
            others.append((entry.site, entry.scale))
    end = 1 + max((layer for points in kinds.values() for layer, _ in points), default=-1)
    with settings(canvas.theme):
        figure = new_figure(canvas, 3.6 if canvas.narrow else 3.5)
        axes = figure.subplots()
        plain_axes(axes, canvas)
        axes.set_yscale("log")
        for index, (kind, points) in enumerate(kinds.items()):
            points.sort()
            line(axes, canvas, index, one_line(kind), [x for x, _ in points], [y for _, y in points])
        for offset, (site, scale) in enumerate(others):
            axes.plot(
                [end + offset],
                [scale],
                label=one_line(site),
                color=canvas.theme.ink,
                marker="*",
                markersize=8,
                linestyle="none",
            )
        log_ticks(axes.yaxis)
        layer_ticks(axes)
        axes.set_xlabel("layer")
        axes.set_ylabel("scale (one INT8 step)")
        legend(figure, axes, 3 if canvas.narrow else 6)
    return figure


def stages_figure(stages: Sequence[Stage], canvas: Canvas = WIDE_LIGHT) -> Figure:
    """Draw the seconds of every stage from top to bottom; reused stages are outlined and labelled."""
    theme = canvas.theme
    longest = max((stage.seconds for stage in stages), default=0) or 1
    with category_figure(canvas, [one_line(stage.stage) for stage in stages], margin=0.55, step=0.32) as (figure, axes):
        for position, stage in enumerate(stages):
            axes.barh(
                [position],
                [stage.seconds],
                height=0.6,
                facecolor="none" if stage.reused else theme.series[0],
                edgecolor=theme.muted if stage.reused else theme.series[0],
                linewidth=0.9,
            )
            label = duration(stage.seconds) + (" (reused)" if stage.reused else "")
            value_label(axes, canvas, stage.seconds, position, label)
        axes.set_xlim(0, longest * (1.85 if canvas.narrow else 1.18))
        axes.set_xlabel("seconds")
    return figure


def draw_figures(report: Report) -> dict[str, Drawing]:
    """Return the figures of the sections that the report has, by name (``magnitudes``, ``perplexity``, ...).

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    painters: dict[str, Painter] = {}
    magnitudes, measured, calibration = report.magnitudes, report.perplexity, report.calibration
    if magnitudes is not None and (magnitudes.without or magnitudes.with_prefix):
        painters["magnitudes"] = lambda canvas: magnitudes_figure(magnitudes, canvas)
    if measured is not None:
        painters["perplexity"] = lambda canvas: perplexity_figure(measured, canvas, prefix=has_prefix(report))
    if calibration is not None and calibration.sites:
        painters["scales"] = lambda canvas: scales_figure(calibration, canvas)
    if report.stages:
        painters["stages"] = lambda canvas: stages_figure(report.stages, canvas)
    return {name: draw(painter) for name, painter in painters.items()}
