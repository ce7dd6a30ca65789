"""The tutorial: its commands run, in the order of the page, and print what the page says, in shape.

The model is a tiny one with a planted sink; numbers and texts differ, words do not. What would need a network, the
lines that install and fetch, is compared with what they bring.
"""

from __future__ import annotations

import json
import re
import shlex
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from cushion_deploy.dependencies import EXTRAS_OF
from cushion_deploy.report.document import Report

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
MODEL = ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[2]
INSTALLING = ("pip ", "python3 ", ". ", "python bench/")
RUN = ("doctor", "build", "verify", "inspect", "generate", "chat", "serve")
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Digest of the model, as the summary of every build of the demo names it."""
DRIVER = "from cushion_deploy.cli.main import main; main()"


@dataclass(frozen=True)
class Block:
    """A command block of the page, and the output that follows it."""

    commands: list[str]
    output: list[str]


def blocks() -> list[Block]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```\n", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    found: list[Block] = []
    for kind, content in fences:
        if kind == "text":
            found[-1] = Block(found[-1].commands, content.splitlines())
        else:
            found.append(Block(content.replace("\\\n", " ").splitlines(), []))
    return found


def block(start: str) -> Block:
    (found,) = (b for b in blocks() if any(start in command for command in b.commands))
    return found


def label(line: str) -> str:
    """Return the words of a line without numbers: its first column in a table, all of it in a sentence."""
    first = re.split(r" {2,}", line.strip(), maxsplit=1)[0]
    return re.sub(r"[−+]?\d[\d.,]*( (kB|MB|GB))?", "#", first.partition("…")[0]).strip()


def assert_shape(expected: list[str], printed: str) -> None:
    got = [label(line) for line in printed.splitlines()]
    for line in filter(str.strip, expected):
        assert any(g.startswith(label(line)) for g in got), (line, got)


@dataclass(frozen=True)
class Page:
    """A folder in which the build of the page has run, and what it printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def built(
    planted_bundle: Any, planted_folder: Path, small: list[str], cli: Any, tmp_path_factory: pytest.TempPathFactory
) -> Page:
    """Run the build of the page, with another model and small settings, whose stages are finished already."""
    folder = tmp_path_factory.mktemp("tutorial")
    (command,) = block("cushion-deploy build").commands
    words = [str(planted_folder) if word == MODEL else word for word in shlex.split(command)[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = cli(*words, *small, "--work-dir", planted_bundle.work, "--quiet")
    assert done.code == 0, done.err
    return Page(folder, done.out)


@pytest.fixture
def folder(built: Page, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(built.folder)
    return built.folder


def test_every_block_is_run_or_checked() -> None:
    for each in blocks():
        for command in each.commands:
            known = [f"cushion-deploy {verb} " in command for verb in RUN]
            assert any(known) or command.startswith((*INSTALLING, "curl ")), command


def test_the_install_lines_bring_what_the_commands_of_the_page_need() -> None:
    lines = block("pip install").commands
    assert lines[:2] == ["python3 -m venv .venv", ". .venv/bin/activate"]
    (extras,) = (re.findall(r"cushion-deploy\[([\w,]+)\]", line) for line in lines if "cushion-deploy" in line)
    needed = {extra for verb in RUN for extra in EXTRAS_OF.get(verb, ())}
    # TensorRT and OpenVINO are engines that the page does not use.
    assert needed - {"gpu", "openvino", "rtx", "tensorrt", "cuda"} <= set(extras[0].split(","))
    (torch,) = (line for line in lines if line.startswith("pip install torch"))
    assert torch.endswith("--index-url https://download.pytorch.org/whl/cpu")


def test_the_model_is_the_one_that_make_fetches(cli: Any) -> None:
    (command,) = block("fetch_model.py").commands
    assert command == f"python bench/fetch_model.py {MODEL}"
    assert (ROOT / "bench" / "fetch_model.py").is_file()
    assert f"MODEL  := {MODEL}\n" in (ROOT / "Makefile").read_text()
    assert GGUF_SHA256 in (ROOT / "bench" / "fetch_model.py").read_text()


def test_doctor_runs_on_the_model(cli: Any, planted_folder: Path, small: list[str], tmp_path: Path) -> None:
    (command,) = block("cushion-deploy doctor").commands
    words = [str(planted_folder) if word == MODEL else word for word in shlex.split(command)[1:]]
    text = small[small.index("--calib-data") + 1]
    done = cli(*words, "--calib-data", text, "--work-dir", tmp_path / "work")
    assert done.code == 0, done.err
    assert "attention sinks" in done.out


def test_the_build_prints_the_summary_of_the_page(built: Page) -> None:
    found = block("cushion-deploy build")
    sentence, table = found.output[:3], found.output[4:]
    assert "runs in static W8A8" in sentence[0]
    assert "runs in static W8A8" in built.printed
    names = {label(line) for line in table if line.strip()} - {"FP"}
    assert names <= {label(line) for line in built.printed.splitlines()}
    assert {"perplexity", "KL from position # on", "engine", "parity", "ship it?"} <= names
    assert (built.folder / "demo" / "report" / "report.html").is_file()


@pytest.mark.parametrize("start", ["cushion-deploy verify", "cushion-deploy inspect", "cushion-deploy generate"])
def test_a_command_prints_what_the_page_says(folder: Path, cli: Any, start: str) -> None:
    found = block(start)
    (command,) = found.commands
    done = cli(*shlex.split(command)[1:])
    assert done.code == 0, done.err
    assert_shape(found.output, done.out)


def test_chat_through_a_pipe(folder: Path, python: Any) -> None:
    (command,) = block("cushion-deploy chat").commands
    said, _, chat = command.partition(" | ")
    message = shlex.split(said)[1].replace("\\n", "\n")
    done = python(DRIVER, *shlex.split(chat)[1:], stdin=message)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.fixture
def served(folder: Path, start: Any) -> Iterator[tuple[str, str]]:
    """Return the first line of the server of the page, on a free port, and its address."""
    (command,) = block("cushion-deploy serve").commands
    child = start(DRIVER, *shlex.split(command)[1:], "--port", "0")
    try:
        line = child.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, line + child.stderr.read()
        yield line, address[0]
    finally:
        child.kill()
        child.communicate()


def test_the_server_answers_the_request_of_the_page(served: tuple[str, str]) -> None:
    line, address = served
    promised = block("cushion-deploy serve").output[0].partition(":8000")[0]
    assert line.startswith(promised)
    (command,) = block("curl").commands
    words = shlex.split(command)
    name, _, value = words[words.index("-H") + 1].partition(": ")
    url = words[1].replace("http://127.0.0.1:8000", address)
    request = urllib.request.Request(url, words[words.index("-d") + 1].encode(), {name: value})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] <= 24
    with urllib.request.urlopen(address, timeout=60) as response:
        assert b"<html" in response.read()


def test_the_report_of_a_build_fits_the_published_schema(planted_bundle: Any, tiny_bundle: Any) -> None:
    validator = jsonschema_rs.Draft202012Validator(Report.model_json_schema(mode="serialization"))
    for each in (planted_bundle, tiny_bundle):
        report = json.loads((each.bundle / "report" / "report.json").read_text())
        assert [error.message for error in validator.iter_errors(report)] == []
