"""The command line in this process, and whole builds of the tiny models that many tests look at."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.cli.main import run

ROOT = Path(__file__).parents[2]
SETTINGS = """
search: {ship: always, text_tokens: 64, random_candidates: 8, screen_candidates: 8, audit_tokens: 4}
calibration: {windows: 4, window: 64}
evaluation: {window: 64, max_tokens: 128}
parity: {tokens: 64, decode_tokens: 4}
"""
SENTENCES = (
    "A few semantically empty tokens become attention sinks and carry very large activations.",
    "The quick brown fox jumps over the lazy dog; the dog sleeps, and the fox is gone by then.",
    "When nothing else is worth attending to, a head attends to the first token of the text.",
)


@dataclass(frozen=True)
class Result:
    """What a command did: exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Stdout as exactly one JSON document."""
        return json.loads(self.out)


Run = Callable[..., Result]


def call(*arguments: object) -> Result:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(a) for a in arguments])
    return Result(int(code), out.getvalue(), err.getvalue())


def environment() -> dict[str, str]:
    """Return the environment of a child that imports this source tree and stays on one thread."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


@pytest.fixture(scope="session")
def cli() -> Run:
    """Return a function that runs one command in this process."""
    return call


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs Python code in a process of its own."""

    def child(code: str, *arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, input=stdin, env=environment(), timeout=300)

    return child


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """Return a function that starts Python code in a process of its own."""

    def child(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), bufsize=1
        )

    return child


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the options that make every stage small, with texts for calibration and evaluation."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "recipe.yaml").write_text(SETTINGS)
    (folder / "calib.txt").write_text(" ".join(SENTENCES * 8))
    (folder / "eval.txt").write_text("\n".join(reversed(SENTENCES * 6)))
    return [
        *("--recipe", str(folder / "recipe.yaml"), "--calib-data", str(folder / "calib.txt")),
        *("--eval-data", str(folder / "eval.txt"), "--quantize-head"),
    ]


@dataclass(frozen=True)
class Built:
    """A finished build: its bundle, its work folder, the options to say it again, and what the command printed."""

    bundle: Path
    work: Path
    options: list[str]
    result: Result


def _build(model: Path, small: list[str], folder: Path, *more: str) -> Built:
    options = ["--model", str(model), *small, "--work-dir", str(folder / "work")]
    result = call("build", *options, "--engine", "onnxruntime", "--output", folder / "bundle", *more)
    assert result.code == 0, result.err
    return Built(folder / "bundle", folder / "work", options, result)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_folder: Path, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return a build of the random Llama, which has no sink; printed as JSON."""
    return _build(tiny_folder, small, tmp_path_factory.mktemp("tiny-build"), "--json")


@pytest.fixture(scope="session")
def planted_bundle(planted_folder: Path, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return a build of the Llama with a planted sink; printed for a person."""
    return _build(planted_folder, small, tmp_path_factory.mktemp("planted-build"))


@pytest.fixture
def copy(tiny_bundle: Built, tmp_path: Path) -> Path:
    """Return a copy of the random Llama's bundle that a test may damage."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny_bundle.bundle, folder)
    return folder
