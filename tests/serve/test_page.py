"""The page at `/`: its files, and a conversation in headless Chromium, light and dark, narrow and wide."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import BINARY, Chromium

from cushion_deploy.serve.page import FILES, read_file
from cushion_deploy.store import publish, staging_area

SIZES = [(1280, False), (1280, True), (360, False), (360, True)]


def test_the_files_refer_to_nothing_elsewhere() -> None:
    for name in FILES:
        text = read_file(name).decode()
        assert not re.search(r"https?://|//[a-z]+\.|@import|innerHTML|eval\(", text), name
        assert "on" + "click=" not in text
    html = read_file("index.html").decode()
    assert set(re.findall(r'(?:src|href)="(/[^"]*)"', html)) <= {path for path, _ in FILES.values()}


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_every_file_is_served_with_a_policy(served: Any) -> None:
    for name, (path, kind) in FILES.items():
        got = served.get(path)
        assert (got.status_code, got.content, got.headers["content-type"]) == (200, read_file(name), kind)
        assert "default-src 'none'" in got.headers["content-security-policy"]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """Return a running browser, or skip."""
    if BINARY is None:
        pytest.skip("no Chromium on this machine")
    found = Chromium(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


def say(browser: Chromium, text: str) -> None:
    browser.run(f"document.getElementById('input').value = {json.dumps(text)}; document.getElementById('send').click()")


def last(browser: Chromium) -> Any:
    return browser.run("document.querySelector('#messages li:last-child .text').textContent")


IDLE = "document.getElementById('stop').disabled && !document.getElementById('send').disabled"


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_a_conversation(served: Any, browser: Chromium, generator: Any, width: int, dark: bool, tmp_path: Path) -> None:
    browser.open(served.url, width=width, dark=dark)
    browser.until("document.title === 'tiny'")
    browser.run(
        "const s = document.getElementById('settings').elements; s.temperature.value = 0; s.max_tokens.value = 12"
    )
    say(browser, "<b>the fox</b>")
    browser.until(IDLE)
    messages = [{"role": "user", "content": "<b>the fox</b>"}]
    expected = generator.chat(messages, max_new_tokens=12).text
    assert last(browser) == expected
    assert browser.run("document.querySelector('li.user .text').textContent") == "<b>the fox</b>"
    assert re.search(
        r"\d+ tokens? · [\d.]+ tokens/s", browser.run("document.querySelector('li:last-child .note').textContent")
    )
    say(browser, "and?")
    browser.until(IDLE)
    messages += [{"role": "assistant", "content": expected}, {"role": "user", "content": "and?"}]
    assert last(browser) == generator.chat(messages, max_new_tokens=12).text
    browser.run("document.getElementById('retry').click()")
    browser.until(IDLE)
    assert browser.run("document.querySelectorAll('#messages li').length") == 4
    assert last(browser) == generator.chat(messages, max_new_tokens=12).text
    # Nothing is wider than the window, what is written can be read, and nothing came from elsewhere.
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert contrast(browser, "#messages li:last-child .text", "#messages li:last-child") >= 4.5
    assert contrast(browser, "#messages li:last-child .note", "#messages li:last-child") >= 4.5
    assert contrast(browser, "#send", "#send") >= 4.5
    assert all(url.startswith(served.url) for url in browser.requested())
    assert browser.problems() == []
    keep(browser, tmp_path, f"chat-{width}-{'dark' if dark else 'light'}")


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_stop_ends_the_answer_on_the_server_too(serve: Any, browser: Chromium) -> None:
    from time import sleep

    class Slow:
        def __init__(self, session: Any) -> None:
            self.contract, self.close, self.reset, self.truncate = (
                session.contract, session.close, session.reset, session.truncate,
            )  # fmt: skip
            self._session = session

        length = property(lambda self: self._session.length)

        def run(self, *args: Any, **more: Any) -> Any:
            sleep(0.05)
            return self._session.run(*args, **more)

    served = serve(change=Slow)
    browser.open(served.url)
    browser.until("document.title === 'tiny'")
    say(browser, "the")
    browser.until("document.querySelector('#messages li:last-child .text').textContent.length > 3")
    assert served.engine.scheduler.running == 1
    browser.run("document.getElementById('stop').click()")
    browser.until(IDLE)
    assert browser.run("document.querySelector('li:last-child .note').textContent") == "stopped"
    assert served.idle(2)


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_errors_and_a_key_are_shown(serve: Any, browser: Chromium) -> None:
    from cushion_deploy.serve.app import AppSettings

    served = serve(AppSettings(api_key="secret"))
    browser.open(served.url)
    browser.until("document.getElementById('status').textContent.includes('API key')")
    say(browser, "x")
    browser.until("(document.querySelector('.error') || {}).textContent?.includes('API key')")
    key = "document.getElementById('settings').elements.key"
    browser.run(f"{key}.value = 'secret'; {key}.dispatchEvent(new Event('change'))")
    browser.until("document.title === 'tiny'")


REPORT: dict[str, Any] = {
    "schema": 1,
    "tool": {"version": "0.1.0"},
    "created": "2026-01-02T03:04:05Z",
    "model": {
        "family": "llama", "parameters": 1000, "source": "<i>small", "layers": 2, "hidden_size": 64, "heads": 4,
        "kv_heads": 2, "vocab_size": 384, "weights_digest": "00",
    },
    "precision": "w8a8",
    "perplexity": {
        "corpus": "text", "window": 64, "tokens": 640,
        "fp": 17.0, "fp_prefix": 16.5, "quantized": 25.0, "quantized_prefix": 16.75,
        "divergence": {"fp": 0.0, "fp_prefix": 0.0226, "quantized": 0.0161, "quantized_prefix": 0.0256},
        "divergence_stderr": {"fp": 0.0, "fp_prefix": 0.0052, "quantized": 0.0004, "quantized_prefix": 0.0052},
    },
    "engines": [
        {
            "engine": "onnxruntime", "targets": ["cpu"], "linears": 14, "int8_linears": 13, "fused_attention": 2,
            "ran": True,
        },
    ],
}  # fmt: skip


def with_report(bundle_path: Path, out: Path, text: str) -> Path:
    """Return a copy of the bundle with a report of this text."""
    with staging_area(out) as staged:
        shutil.copytree(bundle_path, staged, dirs_exist_ok=True)
        (staged / "cushion.json").unlink()
        (staged / "report").mkdir()
        (staged / "report" / "report.json").write_text(text)
        publish(staged, out, {}, {})
    return out


@pytest.fixture
def reported(bundle_path: Path, tmp_path: Path) -> Path:
    """Return the bundle with a report."""
    return with_report(bundle_path, tmp_path / "reported", json.dumps(REPORT))


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
@pytest.mark.parametrize("text", ["{", json.dumps({**REPORT, "schema": 0}), json.dumps({**REPORT, "older": 1})])
def test_a_bundle_whose_report_cannot_be_read_is_served_without_it(
    serve: Any, bundle_path: Path, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = serve(path=with_report(bundle_path, tmp_path / "other", text))
    assert served.get("/proof").json()["report"] is None
    assert "report.json is not a report" in caplog.text
    done = served.client().completions.create(model="tiny", prompt="x", max_tokens=1)
    assert done.usage.completion_tokens == 1


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
def test_the_panel_says_that_there_is_no_report(served: Any, browser: Chromium) -> None:
    browser.open(served.url)
    browser.until("document.title === 'tiny'")
    assert browser.run("document.getElementById('sentence').textContent") == "This bundle has no readable report."


@pytest.mark.parametrize("tiny", ["baked"], indirect=True)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_the_panel_shows_the_report(
    serve: Any, reported: Path, browser: Chromium, width: int, dark: bool, tmp_path: Path
) -> None:
    served = serve(path=reported)
    browser.open(served.url, width=width, dark=dark)
    browser.until("document.title === 'tiny'")
    if width < 600:
        assert browser.run("getComputedStyle(document.getElementById('panel')).display") == "none"
        browser.run("document.getElementById('panel-button').click()")
    rows = browser.run("[...document.querySelectorAll('#table tr')].map(r => [...r.children].map(c => c.textContent))")
    assert rows[0] == ["", "FP", "FP + prefix", "quantized", "quantized + prefix"]
    assert rows[1] == ["perplexity", "17.00", "16.50", "25.00", "16.75"]
    text = browser.run("document.getElementById('panel').innerText")
    assert "13 of 14 linears" in text
    assert "<i>small" in text
    assert browser.run("document.querySelectorAll('#panel i').length") == 0
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.scroll'))") <= 0
    assert contrast(browser, "#panel dt", "#panel") >= 4.5
    assert contrast(browser, "#sentence", "#panel") >= 4.5
    assert browser.problems() == []
    keep(browser, tmp_path, f"panel-{width}-{'dark' if dark else 'light'}")


def contrast(browser: Chromium, front: str, back: str) -> float:
    """Return the contrast ratio (WCAG 2) of a text and the background of an element."""

    def luminance(selector: str, name: str) -> float:
        style = f"getComputedStyle(document.querySelector({json.dumps(selector)})).{name}"
        channels = [int(c) / 255 for c in re.findall(r"\d+", browser.run(style))[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted((luminance(front, "color"), luminance(back, "backgroundColor")))
    return (b + 0.05) / (a + 0.05)


def keep(browser: Chromium, folder: Path, name: str) -> None:
    """Write a screenshot, to look at it when a test fails."""
    target = Path(os.environ.get("CUSHION_SCREENSHOTS", folder))
    (target / f"{name}.png").write_bytes(browser.screenshot())
