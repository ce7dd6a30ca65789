"""Settings and texts that cannot work are refused before anything is searched; text that is not UTF-8, anywhere."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.errors import ExitCode

SETTINGS: dict[str, str] = {
    "export.opset=13": "export.opset is 13",
    "export.opset=23": "export.opset is 23",
    "export.keep_float=[nonsense]": "'nonsense', which is not a quantized Site",
    "export.keep_float=['auto:0']": "export.keep_float holds 'auto:0'",
    "export.keep_float=['auto:13']": "keeps all 13 Sites of this model, so nothing would be quantized",
    "search.seed_tokens=[abcdefghijkl]": "the seeds are 12 tokens, more than search.max_length = 4",
    "search.text_tokens=5000": "search.text_tokens is 5000",
    "evaluation.data=nowhere.txt": "unknown data set 'nowhere.txt'",
    "parity.data=nowhere.txt": "unknown data set 'nowhere.txt'",
    "parity.data=one.txt": "one.txt holds 1 token, and the parity ladder needs 2",
    "evaluation.data=one.txt": "one.txt holds 1 tokens, fewer than one window of 64",
    "calibration.data=one.txt": "one.txt holds 1 tokens, fewer than one window of 64",
    "calibration.data=some.txt": "some.txt holds 70 tokens, fewer than search.text_tokens = 128",
    "compute.device=mps": "device 'mps' is not available here",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a work folder for all refused commands; the first of them describes the model."""
    return tmp_path_factory.mktemp("early")


@pytest.fixture
def attempt(
    cli: Any, tiny_folder: Path, small: list[str], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Return a function that runs a command on the random Llama in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "some.txt").write_text("0" * 70)

    def run(verb: str, *more: object) -> Any:
        extra = ["--engine", "onnxruntime"] if verb == "build" else []
        return cli(verb, "--model", tiny_folder, *small, *extra, "--work-dir", work, "--output", "out", *more)

    return run


def made(work: Path) -> set[str]:
    """Return the finished stages in a work folder."""
    return {path.parent.name for path in (work / "stages").glob("*/*")}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_cannot_be_built_is_refused_before_the_search(
    attempt: Any, work: Path, tmp_path: Path, setting: str
) -> None:
    if "mps" in setting and sys.platform == "darwin":
        pytest.skip("a Mac has this device")
    longer = ["--set", "search.text_tokens=128"] if "some.txt" in setting else []
    found = attempt("build", *longer, "--set", setting)
    assert (found.code, SETTINGS[setting] in found.err) == (ExitCode.USAGE, True), found.err
    assert made(work) <= {"tokenizer"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["search", "calibrate", "tune", "export"])
def test_the_verbs_of_single_stages_check_as_early(attempt: Any, work: Path, verb: str) -> None:
    found = attempt(verb, "--set", "export.keep_float=[nonsense]", "--set", "tuning.window=64")
    assert (found.code, "nonsense" in found.err) == (ExitCode.USAGE, True), found.err
    assert made(work) <= {"tokenizer"}


def test_an_embedding_without_whole_blocks_is_refused_before_the_search(
    attempt: Any, tiny_writer: Callable[..., Path], work: Path, tmp_path: Path
) -> None:
    folder = tiny_writer(tmp_path / "narrow", hidden_size=48, num_attention_heads=3, num_key_value_heads=3)
    found = attempt("build", "--model", folder, "--set", "export.embedding=int8")
    assert (found.code, "blocks of 32 values, and rows of this model have 48" in found.err) == (ExitCode.USAGE, True)
    assert made(work) <= {"tokenizer"}


def test_rows_of_a_chat_need_a_template_before_the_search(
    attempt: Any, tiny_folder: Path, work: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_folder.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}) + "\n")
    found = attempt("build", "--model", bare, "--calib-data", "chats.jsonl")
    assert found.code == ExitCode.USAGE
    assert "chats.jsonl, line 1 is a conversation, but the model has no chat template" in found.err
    assert made(work) <= {"tokenizer"}


@pytest.mark.parametrize(
    "arguments", [("generate", "out"), ("build", "--model"), ("generate", "out", "--system")], ids=" ".join
)
def test_an_argument_that_is_not_utf8_is_refused(cli: Any, arguments: tuple[str, ...]) -> None:
    found = cli(*arguments, "caf\udce9")
    assert found.code == ExitCode.USAGE
    assert f"argument {len(arguments) + 1} is not UTF-8 text: byte 0xe9 at offset 3" in found.err


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_stdin_that_is_not_utf8_is_refused(
    cli: Any, tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n\xef\xbb\xbfcaf\xe9\n"), encoding="utf-8"))
    found = cli(verb, tiny_bundle.bundle)
    assert found.code == ExitCode.USAGE
    assert "stdin is not UTF-8 text: byte 0xe9 at offset 7" in found.err


def test_a_byte_order_mark_is_no_part_of_a_prompt(cli: Any, tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffThe fox".encode())))
    assert cli("generate", tiny_bundle.bundle, "--max-new-tokens", 1).out.startswith("The fox")


def test_a_file_of_prompts_may_begin_with_a_mark_and_must_be_utf8(cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "The fox"}\n', encoding="utf-8-sig")
    options = "--output", tmp_path / "answers.jsonl", "--max-new-tokens", 1
    assert cli("generate", tiny_bundle.bundle, "--input", tmp_path / "a.jsonl", *options).code == ExitCode.OK
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    found = cli("generate", tiny_bundle.bundle, "--input", tmp_path / "b.jsonl", *options)
    assert (found.code, "b.jsonl is not UTF-8 text: byte 0xe9 at offset 15" in found.err) == (ExitCode.USAGE, True)


def test_an_option_that_may_be_text_with_a_dash_is_explained(cli: Any) -> None:
    found = cli("generate", "out", "-1")
    assert found.code == ExitCode.USAGE
    assert "generate -- BUNDLE -1" in found.err


@pytest.mark.parametrize("verb", ["search", "calibrate", "export", "tune"])
def test_a_folder_that_cannot_be_written_to_is_named_before_the_model_is_read(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    # As root and on a read-only file system alike, which a test cannot mount everywhere.
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    found = cli(verb, "--model", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert (found.code, f"{tmp_path} is not writable" in found.err) == (ExitCode.USAGE, True), found.err
