"""How the report's figures look: colours, type, axes and ticks, shared by every figure."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cushion_deploy.report.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_FACES = ("Inter", "Helvetica Neue", "Liberation Sans", "Arial", "DejaVu Sans")
_MARKERS = "os^Dv"


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; series also differ in marker, so colour alone never carries the meaning."""

    ink: str
    muted: str
    grid: str
    background: str
    series: tuple[str, str, str, str, str]


LIGHT = Theme("#1d2126", "#5a626c", "#e4e2dc", "#ffffff", ("#0b5c93", "#d55e00", "#009e73", "#a85c8c", "#4fa8dc"))
DARK = Theme("#e8e6e1", "#a3a8ae", "#33373c", "#1b1e21", ("#6bb8ec", "#f08a3c", "#2fc596", "#dc96c0", "#c9b458"))


@dataclass(frozen=True)
class Canvas:
    """A theme and a width in inches; 96 CSS pixels are one inch, so text keeps its size on the page."""

    theme: Theme = LIGHT
    width: float = 8.6

    @property
    def narrow(self) -> bool:
        """Whether panels must stand below each other."""
        return self.width < 5


WIDE_LIGHT, WIDE_DARK = Canvas(), Canvas(DARK)
NARROW_LIGHT, NARROW_DARK = Canvas(LIGHT, 3.7), Canvas(DARK, 3.7)


@contextmanager
def settings(theme: Theme) -> Iterator[None]:
    """Hold matplotlib's parameters to the theme while a figure is built or saved."""
    matplotlib = require("matplotlib")
    known = {font.name for font in require("matplotlib.font_manager").fontManager.ttflist}
    parameters = {
        "font.family": [next(face for face in _FACES if face in known)],
        "font.size": 9.5,
        "text.color": theme.ink,
        # Names from a model or a folder are text, never formulas.
        "text.parse_math": False,
        "text.usetex": False,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.08,
        "legend.frameon": False,
        "legend.borderaxespad": 0.2,
        "legend.columnspacing": 1.3,
        "legend.handlelength": 1.6,
        "svg.fonttype": "path",
        "svg.hashsalt": "cushion-deploy",
    }
    with matplotlib.rc_context(parameters):
        yield


def new_figure(canvas: Canvas, height: float) -> Figure:
    """Return an empty figure of the canvas's width and a height in inches; no global pyplot state is touched."""
    figure: Figure = require("matplotlib.figure").Figure(figsize=(canvas.width, height), layout="constrained")
    return figure


def save(figure: Figure, kind: str, **options: Any) -> bytes:
    """Return the figure as ``png`` or ``svg``: no date and a fixed salt, so equal reports give equal bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with settings(LIGHT):
        figure.savefig(buffer, format=kind, metadata=metadata, **options)
    return buffer.getvalue()


def plain_axes(axes: Axes, canvas: Canvas, title: str = "") -> None:
    """Leave of the frame only what is read: a base line, a light grid, quiet ticks."""
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
        # A second round through the colours is told apart by its dashes.
        linestyle="-" if index < len(colours) else "--",
    )


def log_ticks(axis: Axis) -> None:
    """Label the decades of a log axis as plain numbers, or more steps where a decade is too wide."""
    ticker = require("matplotlib.ticker")
    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(ticker.LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))


def layer_ticks(axes: Axes) -> None:
    """Number layers with whole numbers only."""
    axes.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(integer=True, nbins=8))


def category_axis(axes: Axes, canvas: Canvas, labels: Sequence[str]) -> None:
    """Name the rows of a bar figure, the first on top."""
    axes.set_yticks(list(range(len(labels))), labels=list(labels))
    axes.tick_params(axis="y", labelcolor=canvas.theme.ink)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=canvas.theme.grid, linewidth=0.7)


def value_label(axes: Axes, canvas: Canvas, x: float, y: float, text: str) -> None:
    """Write a value just right of its bar or point."""
    axes.annotate(
        text, (x, y), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9, color=canvas.theme.ink
    )
