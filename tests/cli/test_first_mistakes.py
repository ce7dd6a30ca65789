"""What people do wrong first, and the sentence that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.errors import ExitCode

CALLS = {
    "generate": ("missing argument 'BUNDLE'", "usage: cushion-deploy generate [OPTIONS] BUNDLE [PROMPT]"),
    "export": ("missing option '--output'", "usage: cushion-deploy export [OPTIONS]"),
    "serve b --port 99999": ("invalid value for '--port': 99999", "`cushion-deploy serve --help` describes it"),
    "chat b c": ("got unexpected extra argument (c)", "usage: cushion-deploy chat [OPTIONS] BUNDLE"),
    "generate b p --temprature 1": ("no such option", "`cushion-deploy generate --help` describes it"),
    "generate b -1": ("no such option", "goes behind --, as in: generate -- BUNDLE -1"),
    "bild": ("there is no command 'bild'", "did you mean `cushion-deploy build`?"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_call_has_the_form_of_every_error(cli: Any, call: str) -> None:
    done = cli(*call.split())
    first, second = done.err.splitlines()
    problem, hint = CALLS[call]
    assert done.code == ExitCode.USAGE
    assert done.out == ""
    assert first.startswith(f"error: {problem}")
    assert second.startswith("  -> ")
    assert hint in second


@pytest.mark.parametrize("verb", ["chat", "verify", "report"])
def test_a_model_given_as_a_bundle_is_to_be_built(cli: Any, tiny_folder: Path, tmp_path: Path, verb: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    for path in (tiny_folder, file):
        done = cli(verb, path)
        assert done.code != ExitCode.OK
        assert done.err.splitlines()[-1] == (
            f"  -> it is a model: `cushion-deploy build {path} --output OUT` makes a bundle of it"
        )
    other = cli(verb, tmp_path)
    assert "point to a folder that `cushion-deploy build` has written" in other.err


def test_what_is_not_there_cannot_be_inspected(cli: Any, tmp_path: Path) -> None:
    assert f"error: {tmp_path / 'no'} does not exist" in cli("inspect", tmp_path / "no").err


def test_a_dry_run_refuses_a_device_that_is_not_here(cli: Any, tiny_folder: Path, tmp_path: Path) -> None:
    done = cli("build", tiny_folder, "--device", "mps", "--dry-run", "--quiet", "--work-dir", tmp_path / "w")
    assert done.code == ExitCode.USAGE
    assert "device 'mps' is not available here" in done.err


def test_several_engines_are_separated_by_commas(cli: Any, tiny_folder: Path, tmp_path: Path) -> None:
    common = ("build", tiny_folder, "--dry-run", "--quiet", "--work-dir", tmp_path / "w")
    together = cli(*common, "--engine", "onnxruntime,nothing")
    assert "unknown engine 'nothing'" in together.err
    assert cli(*common, "--engine", "onnxruntime,").code == ExitCode.OK
