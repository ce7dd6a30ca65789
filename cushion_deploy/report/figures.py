"""The four figures of the report: magnitudes, perplexity, scales and stages, as matplotlib figures and as bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cushion_deploy.report.document import Calibration, Magnitudes, Perplexity, Report, Stage
from cushion_deploy.report.findings import has_prefix
from cushion_deploy.report.style import (
    LIGHT,
    NARROW_DARK,
    NARROW_LIGHT,
    WIDE_DARK,
    WIDE_LIGHT,
    Canvas,
    category_axis,
    layer_ticks,
    line,
    log_ticks,
    new_figure,
    plain_axes,
    save,
    settings,
    value_label,
)
from cushion_deploy.report.wording import duration, one_line, perplexity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER_SITE = re.compile(r"layers\.(\d+)\.(.+)")
# A bar must begin at zero; beyond this spread the short ones vanish, so points on a log axis are drawn instead.
_LARGEST_BAR_SPREAD = 12.0


@dataclass(frozen=True)
class Drawing:
    """One figure for the page (SVG, wide and narrow, light and dark) and for everything else (PNG on white)."""

    png: bytes
    wide_light: bytes
    wide_dark: bytes
    narrow_light: bytes
    narrow_dark: bytes


def magnitudes_figure(magnitudes: Magnitudes, canvas: Canvas = WIDE_LIGHT) -> Figure:
    """Draw the top-1, top-2, top-3 and median magnitude per layer, without and with the prefix, on one log scale."""
    with settings(canvas.theme):
        figure = new_figure(canvas, 5.6 if canvas.narrow else 3.5)
        rows, columns = (2, 1) if canvas.narrow else (1, 2)
        panels = list(figure.subplots(rows, columns, sharex=True, sharey=True))
        for axes, title, layers in (
            (panels[0], "without prefix", magnitudes.without),
            (panels[1], "with prefix", magnitudes.with_prefix),
        ):
            plain_axes(axes, canvas, title)
            axes.set_yscale("log")
            depth = [entry.layer for entry in layers]
            for index, (label, values) in enumerate(
                (
                    ("largest", [entry.top1 for entry in layers]),
                    ("second", [entry.top2 for entry in layers]),
                    ("third", [entry.top3 for entry in layers]),
                    ("median", [entry.median for entry in layers]),
                )
            ):
                # A log axis has no zero: such a point is left out, not moved.
                line(axes, canvas, index, label, depth, [value if value > 0 else math.nan for value in values])
            layer_ticks(axes)
            if axes is panels[-1] or not canvas.narrow:
                axes.set_xlabel("layer")
            if axes is panels[0] or canvas.narrow:
                axes.set_ylabel("activation magnitude")
        log_ticks(panels[0].yaxis)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


def perplexity_figure(measured: Perplexity, canvas: Canvas = WIDE_LIGHT, *, prefix: bool = True) -> Figure:
    """Draw the measured columns as bars from zero, or as points on a log scale when they lie too far apart."""
    theme = canvas.theme
    named = [
        ("FP", measured.fp, theme.muted),
        ("FP + prefix", measured.fp_prefix, theme.muted),
        ("quantized", measured.quantized, theme.series[1]),
        ("quantized + prefix", measured.quantized_prefix, theme.series[0]),
        ("engine + prefix" if prefix else "engine", measured.engine, theme.series[0]),
    ]
    labels = [label for label, value, _ in named if value is not None]
    colours = [colour for _, value, colour in named if value is not None]
    values = [value for _, value, _ in named if value is not None]
    positions = list(range(len(values)))
    logarithmic = bool(values) and max(values) > _LARGEST_BAR_SPREAD * min(values)
    with settings(theme):
        figure = new_figure(canvas, 0.55 + 0.34 * max(len(values), 1))
        axes = figure.subplots()
        plain_axes(axes, canvas)
        if logarithmic:
            axes.set_xscale("log")
            axes.scatter(values, positions, s=64, color=colours, zorder=3)
            axes.set_xlim(min(values) / 1.5, max(values) * (6 if canvas.narrow else 2))
            log_ticks(axes.xaxis)
        else:
            axes.barh(positions, values, height=0.62, color=colours)
            axes.set_xlim(0, max(values, default=1) * (1.25 if canvas.narrow else 1.1))
        category_axis(axes, canvas, labels)
        for position, value in zip(positions, values, strict=True):
            value_label(axes, canvas, value, position, perplexity(value))
        axes.set_xlabel("perplexity, log scale (lower is better)" if logarithmic else "perplexity (lower is better)")
    return figure


def scales_figure(calibration: Calibration, canvas: Canvas = WIDE_LIGHT) -> Figure:
    """Draw the scale of every Site over its layer, one line per kind of Site; other Sites stand at the right end."""
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
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3 if canvas.narrow else 6)
    return figure


def stages_figure(stages: Sequence[Stage], canvas: Canvas = WIDE_LIGHT) -> Figure:
    """Draw the seconds of every stage from top to bottom; reused stages are outlined and say so."""
    theme = canvas.theme
    longest = max((stage.seconds for stage in stages), default=0) or 1
    with settings(theme):
        figure = new_figure(canvas, 0.55 + 0.32 * max(len(stages), 1))
        axes = figure.subplots()
        plain_axes(axes, canvas)
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
        category_axis(axes, canvas, [one_line(stage.stage) for stage in stages])
        axes.set_xlim(0, longest * (1.85 if canvas.narrow else 1.18))
        axes.set_xlabel("seconds")
    return figure


def draw_figures(report: Report) -> dict[str, Drawing]:
    """Return the figures whose sections the report has, by name (``magnitudes``, ``perplexity``, ...).

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    painters: dict[str, Callable[[Canvas], Figure]] = {}
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


def draw(painter: Callable[[Canvas], Figure]) -> Drawing:
    """Paint one figure on every canvas."""
    wide = painter(WIDE_LIGHT)
    return Drawing(
        png=save(wide, "png", facecolor=LIGHT.background, dpi=200),
        wide_light=save(wide, "svg", transparent=True),
        wide_dark=save(painter(WIDE_DARK), "svg", transparent=True),
        narrow_light=save(painter(NARROW_LIGHT), "svg", transparent=True),
        narrow_dark=save(painter(NARROW_DARK), "svg", transparent=True),
    )
