"""Markdown, page and figures: everything measured is on them, and nothing of a model or a file can break out."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.report.render.drawing import Drawing
from cushion_deploy.report.render.html import render_html
from cushion_deploy.report.render.markdown import render_markdown
from cushion_deploy.study.document import PARTS, Study, read_study
from cushion_deploy.study.figures import draw_figures
from cushion_deploy.study.page import study_page
from cushion_deploy.study.tables import paper_table, tables
from cushion_deploy.study.write import write_study

ByHand = Callable[..., Study]
Whole = Any


class Page(HTMLParser):
    """Tags, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.seen.append(data.replace("\u00a0", " "))


def test_every_cell_of_every_table_is_on_the_page_and_in_markdown(whole: Whole) -> None:
    page = Page(render_html(study_page(whole.study, {})))
    lines = {re.sub(r"[\\*]", "", line) for line in render_markdown(study_page(whole.study, {})).splitlines()}
    for part, title in PARTS.items():
        assert title in page.seen
        if part in whole.study.left_out:
            continue
        for table in (*tables(whole.study, part), *filter(None, [paper_table(part)])):
            for row in table.rows:
                assert {cell for cell in row if cell} <= set(page.seen)
                assert "| " + " | ".join(row) + " |" in lines


def test_the_page_runs_nothing_and_fetches_nothing(whole: Whole) -> None:
    text = render_html(study_page(whole.study, {}))
    assert not {"script", "link", "iframe", "object"} & set(Page(text).tags)
    assert not re.search(r"(src|href|srcset)=\"(?!data:)", text)
    assert files("cushion_deploy.report.render").joinpath("page.css").read_text("utf-8") in text


def test_names_from_a_model_or_a_file_are_text(by_hand: ByHand) -> None:
    hostile = '<script>x</script>|*b* "`'
    data = by_hand().model_dump(mode="json")
    data["calibration"] = hostile
    data["prefix"] = {"token_ids": [1], "tokens": ["<b>`|\u202e"], "tuned": False}
    study = Study.model_validate(data)
    page = render_html(study_page(study, {}))
    assert "script" not in Page(page).tags
    assert "b" not in Page(page).tags[: Page(page).tags.index("dl")]
    assert "\u202e" not in page
    markdown = render_markdown(study_page(study, {}))
    assert r"\<script\>x\</script\>\|\*b\* " in markdown
    assert "\u202e" not in markdown


def test_a_part_that_was_left_out_shows_its_reason_and_no_table(by_hand: ByHand) -> None:
    study = by_hand(left_out={"table2": "lm-eval is not installed"})
    assert any("lm-eval is not installed" in text for text in Page(render_html(study_page(study, {}))).seen)
    markdown = render_markdown(study_page(study, {}))
    assert "Left out: lm-eval is not installed." in markdown
    assert "seven zero-shot tasks" not in markdown
    assert PARTS["table1"] not in markdown


def test_a_folder_holds_json_that_reads_back_markdown_page_and_figures(by_hand: ByHand, tmp_path: Path) -> None:
    attention = [{"layer": i, "prefix": 0.1, "first": 0.5, "rest": 0.4} for i in range(3)]
    study = by_hand(figure3={"tokens": 9, "without": attention, "with": attention})
    names = write_study(study, tmp_path / "out")
    assert sorted(names) == ["figure3.png", "figure3.svg", "study.html", "study.json", "study.md"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(names)
    assert read_study(tmp_path / "out" / "study.json") == study
    assert (tmp_path / "out" / "figure3.png").read_bytes().startswith(b"\x89PNG")
    assert "![" in (tmp_path / "out" / "study.md").read_text()
    assert (tmp_path / "out" / "study.html").read_text().count("data:image/svg+xml") == 4


def test_points_stand_where_the_numbers_are(by_hand: ByHand) -> None:
    from cushion_deploy.study.figures import points_figure

    figure = points_figure([("a", 30.0, 20.0), ("b", None, 25.0)], ("without", "with"), [("FP", 18.0)])
    (axes,) = figure.axes
    drawn = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert drawn == {"without": [[30.0, 0.0]], "with": [[20.0, 0.0], [25.0, 1.0]]}
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "FP"] == [18.0]


def test_a_part_without_numbers_has_no_figure(by_hand: ByHand) -> None:
    assert draw_figures(by_hand(table1=[])) == {}


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', "[1]"])
def test_a_file_that_is_no_study_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(UntrustedArtifact):
        read_study(tmp_path / "study.json")
    with pytest.raises(UntrustedArtifact, match="cannot be read"):
        read_study(tmp_path / "absent.json")


def test_the_committed_study_is_what_the_renderer_writes() -> None:
    folder = Path(__file__).parents[2] / "bench" / "results" / "smollm2"
    study = read_study(folder / "study.json")
    drawings = {path.stem: Drawing(b"", b"", b"", b"", b"") for path in folder.glob("*.svg")}
    assert set(drawings) == {"table1", "table3", "remedies", "table4", "figure2", "figure3"}
    page = study_page(study, drawings)
    assert render_markdown(page) == (folder / "study.md").read_text(encoding="utf-8")
    # All but the images, whose bytes depend on the fonts of the machine.
    written, committed = (
        re.sub('base64,[^"]*', "", html) for html in (render_html(page), (folder / "study.html").read_text("utf-8"))
    )
    assert written == committed
