"""The page: complete, self-contained, and unmoved by hostile strings."""

import base64
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from cushion_deploy.report.document import Report
from cushion_deploy.report.page import report_page
from cushion_deploy.report.render.drawing import Drawing
from cushion_deploy.report.render.html import render_html

SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
FIGURES = {name: Drawing(b"", SVG, SVG, SVG, SVG) for name in ("magnitudes", "perplexity", "scales", "stages")}
VOID = {"meta", "img", "source", "br"}
ATTACKS = [
    "<script>alert(1)</script>",
    "</code><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "</style><style>*{display:none}",
    "<!--",
    "&lt;b&gt;",
]


class Page(HTMLParser):
    """Collect what a browser would act on, and refuse elements that are not closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, text: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += text


def html(data: dict[str, Any], figures: dict[str, Drawing]) -> str:
    return render_html(report_page(Report.model_validate(data), figures))


def render(data: dict[str, Any]) -> Page:
    return Page(html(data, FIGURES))


def test_nothing_is_fetched_and_nothing_runs(data: dict[str, Any]) -> None:
    page = render(data)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        if name in {"src", "srcset", "href", "action", "data", "poster"}:
            assert value.startswith("data:image/svg+xml;base64,"), (tag, name)
    source = html(data, FIGURES)
    assert not re.search(r"url\(|@import|https?://", source)


def test_the_policy_forbids_all_but_inline_style_and_data_images(data: dict[str, Any]) -> None:
    policies = [value for tag, name, value in render(data).attributes if tag == "meta" and "default-src" in value]
    directives = {part.split()[0]: part.split()[1:] for part in policies[0].split(";")}
    assert len(policies) == 1
    assert directives == {
        "default-src": ["'none'"],
        "style-src": ["'unsafe-inline'"],
        "img-src": ["data:"],
        "base-uri": ["'none'"],
        "form-action": ["'none'"],
    }


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_strings_become_text_and_change_no_element(data: dict[str, Any], attack: str) -> None:
    innocent = render(data)
    data["search"]["tokens"][0] = attack
    data["search"]["steps"][0]["top"][0]["token"] = attack
    data["search"]["stopped"] = attack
    data["model"]["family"] = attack
    data["perplexity"]["corpus"] = attack
    data["parity"][0]["metric"] = attack
    data["engines"][1]["note"] = attack
    data["engines"][0]["details"] = {attack: attack, "more": 1}
    data["recipe"] = {"model": attack}
    data["environment"]["versions"] = {"numpy": attack, "onnxruntime": "1", "torch": "2"}
    page = render(data)
    # Stand-ins for spaces are elements of their own inside a token.
    assert [tag for tag in page.tags if tag != "i"] == [tag for tag in innocent.tags if tag != "i"]
    assert attack in page.text
    assert attack.replace(" ", "␣") in page.text


def test_whitespace_tokens_are_legible(data: dict[str, Any]) -> None:
    source = html(data, FIGURES)
    assert '<code class="token"><i>⏎</i></code>' in source
    assert '<code class="token"><i>␣</i></code>' in source
    assert '<code class="token">&lt;|im_start|&gt;</code>' in source


def test_direction_marks_cannot_disguise_any_string(data: dict[str, Any]) -> None:
    data["parity"][0]["metric"] = data["model"]["source"] = "a\u202eb\x1bc"
    text = render(data).text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert "a‹U+202E›b‹U+001B›c" in text


def test_an_engine_that_did_not_run_is_said_so(data: dict[str, Any]) -> None:
    text = " ".join(render(data).text.split())
    assert "208 of 210 linears are compiled in INT8" in text
    assert "not run: no NVIDIA GPU on this machine" in text
    assert "210 of 210 linears run in INT8" in text


def test_a_failed_check_shows_value_limit_and_site(data: dict[str, Any]) -> None:
    data["parity"][2].update(value=0.9971, passed=False, site="layers.3.mlp.down")
    text = " ".join(render(data).text.split())
    order = ("Do not ship: 1 of 7 parity checks fails at layers.3.mlp.down.", "Can I ship it? No: 1 of 7", "Perplexity")
    assert sorted(order, key=text.index) == list(order)
    assert re.search(r"identical codes at layers\.3\.mlp\.down ?0\.9971 ?≥ 0\.999 ?fails", text)


def test_a_report_of_almost_nothing_still_reads(data: dict[str, Any]) -> None:
    minimal = {key: data[key] for key in ("schema", "tool", "created", "model", "precision")}
    page = Page(html(minimal, {}))
    for words in (
        "Not proven",
        "its perplexity was not measured",
        "The parity ladder was not run",
        "No engine was compiled",
        "No search was run",
        "The environment was not recorded",
    ):
        assert words in page.text
    assert "img" not in page.tags


def test_an_empty_prefix_reads_as_a_result(data: dict[str, Any]) -> None:
    data["search"].update(token_ids=[], tokens=[])
    page = render(data)
    assert "No prefix was needed." in page.text
    assert '<section id="prefix">' in html(data, FIGURES)
    assert "<table" not in html(data, FIGURES).partition('<section id="prefix">')[2].partition("</section>")[0]


def test_each_figure_is_embedded_for_light_dark_wide_and_narrow(report: Report) -> None:
    drawing = Drawing(b"", b"wide light", b"wide dark", b"narrow light", b"narrow dark")
    source = render_html(report_page(report, {"stages": drawing}))
    embedded = [base64.b64decode(found) for found in re.findall(r"svg\+xml;base64,([\w+/=]+)", source)]
    assert embedded == [b"narrow dark", b"narrow light", b"wide dark", b"wide light"]


def test_a_part_of_the_vocabulary_that_was_screened_is_stated(data: dict[str, Any]) -> None:
    assert "The self-sink screen ran 16,384 of 49,152 tokens." in render(data).text
    for step in data["search"]["steps"]:
        del step["screened"]
    assert "self-sink screen ran" not in render(data).text, "a report that did not record it is read"


def test_a_search_that_stopped_before_its_first_step_is_explained(data: dict[str, Any]) -> None:
    why = "1.00 of the objective remains without the attention sinks of the text: this model has no sink"
    data["search"].update(token_ids=[], tokens=[], steps=[], rank_in_random_sample=[], stopped=why)
    data["search"].update(candidates_scored=0, positions_scored=1536, positions_full_scan=0, seconds=2.0)
    text = render(data).text
    assert "No prefix was needed" in text
    assert f"The search stopped because {why}." in text
    assert "0 candidates scored exactly" in text


@pytest.mark.parametrize(("sliding", "said"), [(None, False), (511, False), (512, True), (4096, True)])
def test_a_calibration_within_the_sliding_windows_is_stated(
    data: dict[str, Any], sliding: int | None, said: bool
) -> None:
    data["calibration"]["sliding_window"] = sliding
    assert ("do not reach beyond the model's sliding window" in render(data).text) == said


def test_the_largest_values_are_listed_and_a_plan_without_fused_attention_is_warned_about(data: dict[str, Any]) -> None:
    text = render(data).text
    assert "Floating-point type of plans: float16: largest value 1,871 of 65,504" in text
    assert "Measured on 16,384 tokens of WikiText-2 train" in text
    assert "208 of 210 linears are compiled in INT8, attention fused 30 of 30" in text
    assert "warning: no attention" not in text
    data["engines"][1]["fused_attention"] = 0
    assert "warning: no attention of tensorrt-rtx is a fused kernel" in render(data).text
