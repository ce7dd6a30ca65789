"""The figures: what they show is what the report says."""

import io
import re
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from PIL import Image

from cushion_deploy.report import figures
from cushion_deploy.report.document import Report, Stage
from cushion_deploy.report.render import drawing

NARROW_DARK = drawing.Canvas(drawing.DARK, 3.7)
CANVASES = [drawing.WIDE_LIGHT, NARROW_DARK]


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


@pytest.mark.parametrize("canvas", CANVASES)
def test_magnitudes_are_four_lines_on_two_panels_of_one_scale(
    report: Report, data: Any, canvas: drawing.Canvas
) -> None:
    assert report.magnitudes is not None
    panels = figures.magnitudes_figure(report.magnitudes, canvas).axes
    assert [len(panel.lines) for panel in panels] == [4, 4]
    assert [panel.get_yscale() for panel in panels] == ["log", "log"]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    for panel, side in zip(panels, ("without", "with"), strict=True):
        for line, key in zip(panel.lines, ("top1", "top2", "top3", "median"), strict=True):
            np.testing.assert_array_equal(line.get_ydata(), [row[key] for row in data["magnitudes"][side]])


@pytest.mark.parametrize("canvas", CANVASES)
def test_what_is_the_same_with_and_without_a_prefix_is_drawn_once(data: Any, canvas: drawing.Canvas) -> None:
    data["magnitudes"]["with"] = data["magnitudes"]["without"]
    data["perplexity"].update(fp_prefix=29.6, quantized_prefix=63.23)
    report = Report.model_validate(data)
    assert report.magnitudes is not None
    assert report.perplexity is not None
    (panel,) = figures.magnitudes_figure(report.magnitudes, canvas).axes
    assert panel.get_title(loc="left") + panel.get_title() == "with and without prefix"
    assert len(panel.lines) == 4
    (axes,) = figures.perplexity_figure(report.perplexity, canvas).axes
    assert [bar.get_width() for bar in bars(axes)] == [29.6, 63.23, 31.62]


def test_lines_differ_in_more_than_colour(report: Report) -> None:
    assert report.magnitudes is not None
    lines = figures.magnitudes_figure(report.magnitudes).axes[0].lines
    assert len({line.get_marker() for line in lines}) == 4


def test_perplexity_bars_begin_at_zero_and_have_the_measured_lengths(report: Report) -> None:
    assert report.perplexity is not None
    axes = figures.perplexity_figure(report.perplexity).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in bars(axes)] == [
        (0, 29.60),
        (0, 28.90),
        (0, 63.23),
        (0, 31.6),
        (0, 31.62),
    ]
    assert axes.get_xlim()[0] == 0


def test_perplexities_far_apart_become_points_on_a_stated_log_scale(data: dict[str, Any]) -> None:
    data["perplexity"].update(quantized=9250.0, engine=None)
    measured = Report.model_validate(data).perplexity
    assert measured is not None
    axes = figures.perplexity_figure(measured).axes[0]
    assert axes.get_xscale() == "log"
    assert not axes.patches
    assert "log scale" in axes.get_xlabel()


def test_scales_are_one_line_per_kind_and_one_mark_for_the_head(report: Report) -> None:
    assert report.calibration is not None
    lines = figures.scales_figure(report.calibration).axes[0].lines
    assert [line.get_label() for line in lines] == ["attn.qkv", "attn.out", "mlp.gate_up", "mlp.down", "head"]
    assert [np.size(line.get_xdata()) for line in lines] == [30, 30, 30, 30, 1]


def test_reused_stages_are_outlined_and_say_so() -> None:
    stages = [Stage(stage="load", seconds=3, reused=False), Stage(stage="search", seconds=9, reused=True)]
    axes = figures.stages_figure(stages).axes[0]
    assert [bar.get_width() for bar in bars(axes)] == [3, 9]
    assert [to_rgba(bar.get_facecolor())[3] for bar in bars(axes)] == [1, 0]
    assert [text.get_text() for text in axes.texts] == ["3.0 s", "9.0 s (reused)"]


def test_names_are_never_read_as_formulas() -> None:
    stages = [Stage(stage=r"$\frac{1}{$ _", seconds=1, reused=False)]
    assert drawing.save(figures.stages_figure(stages), "svg").startswith(b"<?xml")


def test_drawings_are_real_images_and_missing_sections_have_none(data: dict[str, Any]) -> None:
    data.update(magnitudes=None, calibration=None, perplexity=None, stages=data["stages"][:2])
    drawn = figures.draw_figures(Report.model_validate(data))
    assert list(drawn) == ["stages"]
    with Image.open(io.BytesIO(drawn["stages"].png)) as image:
        assert image.format == "PNG"
        assert image.width == 1720
        pixels = np.asarray(image.convert("RGB"))
    assert tuple(pixels[0, 0]) == (255, 255, 255)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert drawing.DARK.ink.encode() in drawn["stages"].wide_dark
    assert drawing.DARK.ink.encode() not in drawn["stages"].wide_light


@pytest.mark.parametrize("width", [8.6, 3.7])
def test_a_darkened_figure_is_the_one_that_the_dark_theme_draws(report: Report, width: float) -> None:
    assert report.magnitudes is not None
    measured, calibration = report.perplexity, report.calibration
    assert measured is not None
    assert calibration is not None
    painters: list[drawing.Painter] = [
        lambda canvas: figures.magnitudes_figure(report.magnitudes, canvas),
        lambda canvas: figures.perplexity_figure(measured, canvas),
        lambda canvas: figures.scales_figure(calibration, canvas),
        lambda canvas: figures.stages_figure(report.stages, canvas),
    ]
    for painter in painters:
        light, dark = (
            drawing.save(drawing.laid_out(painter(drawing.Canvas(theme, width))), "svg", transparent=True)
            for theme in (drawing.LIGHT, drawing.DARK)
        )
        assert light != dark
        # The ids of markers and clip paths are hashes that include colours.
        assert numbered(drawing.darkened(light)) == numbered(dark)


def numbered(svg: bytes) -> bytes:
    """Return an SVG with its hashed ids replaced by numbers, in order of appearance."""
    seen: dict[bytes, bytes] = {}
    return re.sub(rb"\b[mp][0-9a-f]{10}\b", lambda m: seen.setdefault(m[0], b"id%d" % len(seen)), svg)


def test_equal_reports_give_equal_bytes(report: Report) -> None:
    first, second = (drawing.save(figures.stages_figure(report.stages), "svg") for _ in range(2))
    assert first == second
