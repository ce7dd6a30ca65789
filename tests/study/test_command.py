"""The verb: its folder and its JSON, and bad input that is refused before anything is measured."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.cli.main import run

Desk = Any


def call(*arguments: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([str(a) for a in arguments])
    return int(code), out.getvalue(), err.getvalue()


def test_some_parts_are_measured_and_written(desk: Desk, tmp_path: Path) -> None:
    options = ["study", *desk.options, "--work-dir", tmp_path / "work", "--only", "table2,table5", "--window", 40]
    code, out, _ = call(*options, "--output", tmp_path / "out", "--json")
    assert code == 0
    study = json.loads(out)
    assert study == json.loads((tmp_path / "out" / "study.json").read_text())
    assert study["table5"]["length"] == 40
    assert study["table1"] is None
    assert "no task was given" in study["left_out"]["table2"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"study.json", "study.md", "study.html"}
    code, out, _ = call(*options, "--output", tmp_path / "again")
    assert code == 0
    assert "Table 5" in out
    assert out.endswith(f"written: {tmp_path / 'again'}\n")
    assert all(cell["reused"] for cell in json.loads((tmp_path / "again" / "study.json").read_text())["cells"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only", "table9"], "table9"),
        (["--limit", "3"], "--tasks"),
        (["--set", "search.tau=7"], "tau"),
        (["--max-tokens", "20"], "max_tokens"),
    ],
)
def test_bad_input_is_refused(desk: Desk, tmp_path: Path, more: list[str], words: str) -> None:
    code, _, err = call("study", *desk.options, "--work-dir", tmp_path / "work", "-o", tmp_path / "out", *more)
    assert code == 2
    assert words in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "work").exists()


def test_the_same_text_twice_and_a_folder_in_use_are_refused(desk: Desk, tmp_path: Path) -> None:
    again = ["--eval-data", desk.texts[0]]
    assert call("study", *desk.options, *again, "-o", tmp_path / "out")[0] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert call("study", *desk.options, "-o", tmp_path / "full")[0] == 2
    assert call("study", tmp_path / "absent", "-o", tmp_path / "out", "--work-dir", tmp_path / "work")[0] == 2
