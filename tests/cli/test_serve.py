"""`serve` as a process: it says where it listens, answers, and ends on SIGTERM."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

DRIVER = """
import sys
from cushion_deploy.cli.main import main
import atexit
heavy = {"torch", "transformers", "onnx", "onnx_ir", "matplotlib"}
atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))
main(["serve", *sys.argv[1:]])
"""


@pytest.fixture
def process(start: Any, planted_bundle: Any) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a server and returns its process and its address."""
    started = []

    def serve(*options: str) -> Any:
        child = start(DRIVER, planted_bundle.bundle, "--port", "0", *options)
        started.append(child)
        line = child.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + child.stderr.read()
        return child, found[0], line

    yield serve
    for child in started:
        child.kill()
        child.communicate()


def test_it_answers_and_ends_on_sigterm_without_torch(process: Any, cli: Any, planted_bundle: Any) -> None:
    child, url, line = process("--threads", "1", "--drain-timeout", "30")
    assert "serving bundle on" in line
    assert "in one batch" in line
    expected = cli("generate", planted_bundle.bundle, "A head", "--max-new-tokens", 8, "--json").json
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        got = client.completions.create(model="bundle", prompt="A head", max_tokens=8, temperature=0)
        assert got.choices[0].text == expected["text"]
        stream = iter(client.completions.create(model="bundle", prompt="A", max_tokens=64, stream=True))
        next(stream)
        child.send_signal(signal.SIGTERM)
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
    assert reasons[-1] in ("length", "stop")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, "stopped\n", "[]\n")


def test_a_key_comes_from_a_file(process: Any, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    _, url, _ = process("--api-key-file", str(tmp_path / "key"), "--model-name", "m")
    assert httpx2.get(f"{url}/v1/models").status_code == 401
    found = httpx2.get(f"{url}/v1/models", headers={"Authorization": "Bearer secret"}).json()
    assert found["data"][0]["id"] == "m"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--host", "192.0.2.1", "--allow-anonymous"], "cannot listen"),
        (["--api-key-file", "missing"], "cannot be read"),
        (["--engine", "tensorrt-rtx", "--port", "0"], "not built for"),
        (["--max-rows", "0"], "max-rows"),
    ],
)
def test_bad_options_are_refused_in_words(cli: Any, planted_bundle: Any, options: list[str], words: str) -> None:
    done = cli("serve", planted_bundle.bundle, *options)
    assert done.code == 2, done.err
    assert words in done.err
    assert "Traceback" not in done.err


def test_a_damaged_bundle_is_not_served(cli: Any, copy: Path) -> None:
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    assert cli("serve", copy, "--port", "0").code == 4


def test_a_bundle_of_the_hub_has_its_name_there(cli: Any, planted_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, revision: str | None = None) -> Path:
        asked.append((name, revision))
        return Path(planted_bundle.bundle)

    monkeypatch.setattr("cushion_deploy.runtime.hub.fetch_bundle", fetch)
    monkeypatch.setattr("cushion_deploy.serve.server.run", lambda server, listener: None)
    done = cli("serve", "org/name@v1", "--port", "0")
    assert done.code == 0, done.err
    assert done.out.startswith("serving org/name on ")
    assert asked == [("org/name", "v1")]
