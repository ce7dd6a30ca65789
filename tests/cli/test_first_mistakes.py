"""What people do wrong first, and the sentence that helps."""

from __future__ import annotations

import shutil
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
    "verify b --frobnicate": ("no such option", "`cushion-deploy verify --help` describes it"),
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
        assert done.code == ExitCode.USAGE
        assert done.err.splitlines()[-1] == (
            f"  -> it is a model: `cushion-deploy build {path} --output OUT` makes a bundle of it"
        )
    other = cli(verb, tmp_path)
    assert "point to a folder that `cushion-deploy build` has written" in other.err


@pytest.mark.parametrize("verb", ["inspect", "parity"])
def test_a_folder_beside_the_bundle_is_named_as_what_it_is(cli: Any, tiny_bundle: Any, verb: str) -> None:
    expected = {
        tiny_bundle.work: "it is a work folder: give the folder that `cushion-deploy build` wrote with --output",
        tiny_bundle.bundle / "report": f"it is a part of a bundle: give {tiny_bundle.bundle}",
    }
    for folder, hint in expected.items():
        done = cli(verb, folder)
        assert (done.code, done.err.splitlines()[-1]) == (ExitCode.USAGE, f"  -> {hint}")


def test_no_command_is_answered_with_the_help(python: Any) -> None:
    done = python("from cushion_deploy.cli.main import main\nmain([])")
    assert (done.returncode, done.stdout) == (2, "")
    asked = python("from cushion_deploy.cli.main import main\nmain(['--help'])")
    assert done.stderr.split() == asked.stdout.split()


def test_what_lacks_its_manifest_is_no_model(cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_bundle.bundle, tmp_path / "copied")
    (copied / "cushion.json").unlink()
    for path in (copied, tmp_path / "nowhere.gguf"):
        done = cli("verify", path)
        assert done.code in (2, 4)
        assert "it is a model" not in done.err


@pytest.mark.parametrize("option", ["--drain-timeout", "--request-timeout"])
def test_a_time_that_never_ends_is_refused(cli: Any, tiny_bundle: Any, option: str) -> None:
    done = cli("serve", tiny_bundle.bundle, option, "inf")
    assert done.code == 2
    assert "numbers of seconds" in done.err


@pytest.mark.parametrize("verb", ["bench", "eval", "serve"])
def test_more_threads_than_cpus_are_answered_with_a_warning(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for threads, expected in ((4, ""), (5, "warning: 5 threads on 4 CPUs slow each other down; omit --threads\n")):
        done = cli(verb, tmp_path / "no", "--threads", threads)
        assert done.err.partition("error: ")[0] == expected


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
