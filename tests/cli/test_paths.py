"""Names with everything that a file system allows: a whole build, `verify` and `generate` use them as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.cli.output import require_new_folder
from cushion_deploy.errors import ExitCode, UsageError
from cushion_deploy.recipe.text import parse_yaml

# A leading dash, spaces, both quotes, a line feed, other scripts, and what shells, YAML, HTML and format strings read;
# 255 bytes, the most that file systems allow.
HOSTILE = "-a 'b' \"c\"\n# Grüße: 中文 🚀 $(d) <e> & {f} %s \\"
NAME = HOSTILE + "x" * (255 - len(HOSTILE.encode()))


def test_a_whole_build_with_hostile_names(
    cli: Any, tiny_folder: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(NAME.encode()) == 255
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, tmp_path / "m" / NAME)
    text = NAME[:-4] + ".txt"
    shutil.copy(small[small.index("--calib-data") + 1], tmp_path / text)
    built = cli(
        *("build", *small, "--model", f"m/{NAME}", "--calib-data", text, "--engine", "onnxruntime", "--no-prefix"),
        *("--work-dir", f"{NAME[1:]}", "--output", NAME, "--quiet"),
    )
    assert built.code == ExitCode.OK, built.err
    assert cli("verify", "--", NAME).code == ExitCode.OK
    answer = cli("generate", "--max-new-tokens", 2, "--", NAME, "-The fox")
    assert (answer.code, answer.out.startswith("-The fox")) == (ExitCode.OK, True), answer.err
    # What the bundle says about itself stays readable for other programs, and on one line.
    card = (tmp_path / NAME / "README.md").read_text()
    assert isinstance(parse_yaml(card.split("\n---")[0].removeprefix("---")), dict)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("call", [("eval",), ("parity",), ("generate", "--", "text"), ("build", "--output", "o")])
def test_a_model_or_bundle_whose_name_is_too_long_is_refused_in_words(cli: Any, call: tuple[str, ...]) -> None:
    verb, *more = call
    name = "x" * 256
    done = cli(verb, *(("--", name, *more[1:]) if "--" in more else (name, *more)))
    assert (done.code, done.out) == (ExitCode.USAGE, "")
    assert name[:60] in done.err
    assert "too long" in done.err


@pytest.mark.parametrize("name", ["x" * 256, "x" * 256 + "/below"])
def test_a_folder_whose_name_is_too_long_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        require_new_folder(tmp_path / name)
