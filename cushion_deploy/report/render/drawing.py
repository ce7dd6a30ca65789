"""Figures as images: two colour themes, two widths, and the bytes of SVG and PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from cushion_deploy.report.render.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FACES = ("Inter", "Helvetica Neue", "Liberation Sans", "Arial", "DejaVu Sans")


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


_DARK_OF = {
    light.encode(): dark.encode()
    for light, dark in zip(
        (LIGHT.ink, LIGHT.muted, LIGHT.grid, LIGHT.background, *LIGHT.series),
        (DARK.ink, DARK.muted, DARK.grid, DARK.background, *DARK.series),
        strict=True,
    )
}
_LIGHT_COLOUR = re.compile(b"|".join(_DARK_OF))


@dataclass(frozen=True)
class Canvas:
    """A theme and a width in inches; 96 CSS pixels are one inch, so text keeps its size on the page."""

    theme: Theme = LIGHT
    width: float = 8.6

    @property
    def narrow(self) -> bool:
        """Whether panels are placed below each other instead of side by side."""
        return self.width < 5


WIDE_LIGHT, NARROW_LIGHT = Canvas(), Canvas(width=3.7)

Painter: TypeAlias = "Callable[[Canvas], Figure]"
"""Draws one figure on a canvas."""


@dataclass(frozen=True)
class Drawing:
    """One figure for pages (SVG, wide and narrow, light and dark) and for other documents (PNG on white)."""

    png: bytes
    wide_light: bytes
    wide_dark: bytes
    narrow_light: bytes
    narrow_dark: bytes


def draw(painter: Painter) -> Drawing:
    """Draw one figure on every canvas."""
    wide, narrow = laid_out(painter(WIDE_LIGHT)), laid_out(painter(NARROW_LIGHT))
    wide_light, narrow_light = save(wide, "svg", transparent=True), save(narrow, "svg", transparent=True)
    return Drawing(
        png=save(wide, "png", facecolor=LIGHT.background, dpi=200),
        wide_light=wide_light,
        wide_dark=darkened(wide_light),
        narrow_light=narrow_light,
        narrow_dark=darkened(narrow_light),
    )


def laid_out(figure: Figure) -> Figure:
    """Place everything in a figure once; savefig would do it again for every file, which takes most of its time."""
    with settings(LIGHT):
        figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def darkened(svg: bytes) -> bytes:
    """Return an SVG that was drawn in the light theme in the colours of the dark one."""
    return _LIGHT_COLOUR.sub(lambda match: _DARK_OF[match[0]], svg)


@contextmanager
def settings(theme: Theme) -> Iterator[None]:
    """Apply the theme to matplotlib's parameters while a figure is drawn or saved."""
    matplotlib = import_extra("matplotlib")
    known = {font.name for font in import_extra("matplotlib.font_manager").fontManager.ttflist}
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
    """Return an empty figure with the canvas's width and a height in inches, without global pyplot state."""
    figure: Figure = import_extra("matplotlib.figure").Figure(figsize=(canvas.width, height), layout="constrained")
    return figure


def save(figure: Figure, kind: str, **options: Any) -> bytes:
    """Return the figure as ``png`` or ``svg``, without a date and with a fixed salt: equal input gives equal bytes."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with settings(LIGHT):
        figure.savefig(buffer, format=kind, metadata=metadata, **options)
    return buffer.getvalue()
