"""Draw the figure of the README from the report of a bundle: `python bench/figures.py demo docs/figures`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from cushion_deploy.report.document import read_report
from cushion_deploy.report.figures import magnitudes_figure
from cushion_deploy.report.render.drawing import DARK, LIGHT, WIDE_LIGHT, laid_out, save


def themed(svg: bytes) -> bytes:
    """Return an SVG of the light theme whose colours are variables, and follow the scheme of the reader's system."""
    names = ("ink", "muted", "grid", "background")
    light, dark = ([*(getattr(t, n) for n in names), *t.series] for t in (LIGHT, DARK))
    for index, colour in enumerate(light):
        svg = svg.replace(colour.encode(), b"var(--c%d)" % index)

    def values(colours: list[str]) -> str:
        return ";".join(f"--c{index}:{colour}" for index, colour in enumerate(colours))

    style = f":root{{{values(light)}}}@media(prefers-color-scheme:dark){{:root{{{values(dark)}}}}}"
    return svg.replace(b"<defs>", f"<style>{style}</style><defs>".encode(), 1)


def compact(svg: bytes) -> bytes:
    """Return an SVG without comments and indentation, coordinates to a tenth of a point, one class for each marker."""
    # matplotlib repeats the style of a marker at every point.
    marker = re.compile(rb'style="fill: (var\(--c(\d)\)); stroke: \1; stroke-linejoin: miter"')
    rules = b"".join(
        b".m%s{fill:var(--c%s);stroke:var(--c%s)}" % (n, n, n) for n in sorted({m[1] for m in marker.findall(svg)})
    )
    svg = marker.sub(rb'class="m\2"', svg).replace(b"<style>", b"<style>" + rules, 1)
    svg = re.sub(rb"<!--.*?-->", b"", svg, flags=re.DOTALL)
    svg = re.sub(rb"\b[1-9]\d*\.\d{2,}", lambda match: b"%g" % round(float(match[0]), 1), svg)
    return re.sub(rb"\s*\n\s*", b"\n", svg[svg.index(b"<svg") :])


def main() -> None:
    """Write activations.svg."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    magnitudes = read_report(given.bundle / "report" / "report.json").magnitudes
    if magnitudes is None:
        parser.error(f"the report of {given.bundle} has no magnitudes")
    figure = laid_out(magnitudes_figure(magnitudes, WIDE_LIGHT))
    given.folder.mkdir(parents=True, exist_ok=True)
    target = given.folder / "activations.svg"
    target.write_bytes(compact(themed(save(figure, "svg", facecolor=LIGHT.background))))
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
