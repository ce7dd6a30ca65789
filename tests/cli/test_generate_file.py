"""`generate --input`: the answers of one prompt after the other, in order, and continued after any interruption."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.runtime import load

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "A head attends"},
    {"id": "café", "messages": [{"role": "user", "content": "Hi"}]},
    {"prompt": "The quick brown fox jumps over the lazy dog; the dog", "id": 77},
    {"prompt": "fox"},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "user", "content": "?"},
        ]
    },
]
IDS = [1, "café", 77, 4, 5]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in REQUESTS))
    return file


@pytest.fixture
def answer(cli: Any, planted_bundle: Any, source: Path, tmp_path: Path) -> Any:
    def run(*options: object, output: Path = tmp_path / "answers.jsonl") -> Any:
        more = ("--max-new-tokens", 6, *options)
        return cli("generate", planted_bundle.bundle, "--input", source, "--output", output, *more)

    return run


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_the_answers_are_those_of_one_prompt_after_the_other(
    answer: Any, planted_bundle: Any, tmp_path: Path, batch: int
) -> None:
    done = answer("--batch", batch)
    assert (done.code, done.err) == (0, "")
    found = lines(tmp_path / "answers.jsonl")
    assert [a["id"] for a in found] == IDS
    generator = load(planted_bundle.bundle)
    for request, got in zip(REQUESTS, found, strict=True):
        if "prompt" in request:
            expected = generator.generate(request["prompt"], max_new_tokens=6)
        else:
            plain = [
                {**m, "content": "Be kind." if m["role"] == "system" else m["content"]} for m in request["messages"]
            ]
            expected = generator.chat(plain, max_new_tokens=6)
        counts = (expected.usage.prompt_tokens, expected.usage.new_tokens)
        assert (got["text"], got["finish_reason"]) == (expected.text, expected.finish_reason)
        assert (got["prompt_tokens"], got["new_tokens"]) == counts


@pytest.mark.parametrize("kept", range(0, 1200, 97))
def test_an_interrupted_run_goes_on_wherever_it_was_cut(
    answer: Any, tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cushion_deploy.runtime import answers

    file = tmp_path / "answers.jsonl"
    assert answer("--batch", 2).code == 0
    whole = file.read_bytes()
    asked: list[int] = []
    real = answers.generate_batch
    monkeypatch.setattr(
        answers,
        "generate_batch",
        lambda *a, **k: asked.append(len(a[2])) or real(*a, **k),  # type: ignore[func-returns-value]
    )
    file.write_bytes(whole[:kept])
    done = answer("--batch", 2)
    assert done.code == 0, done.err
    assert file.read_bytes() == whole
    assert sum(asked) == 5 - whole[:kept].count(b"\n")


def test_ctrl_c_keeps_the_answers_so_far(answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cushion_deploy.runtime import answers

    assert answer(output=tmp_path / "whole.jsonl").code == 0
    real, calls = answers.generate_batch, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(answers, "generate_batch", interrupted)
    assert answer().code == 130
    assert len(lines(tmp_path / "answers.jsonl")) == 2
    assert answer().code == 0
    assert (tmp_path / "answers.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("options", [["--max-new-tokens", 5], ["--temperature", 1], ["--seed", 3], ["--stop", "x"], []])
def test_a_run_with_other_options_or_prompts_is_not_continued(
    answer: Any, source: Path, tmp_path: Path, options: list[object]
) -> None:
    assert answer().code == 0
    before = (tmp_path / "answers.jsonl").read_bytes()
    if not options:
        source.write_text(source.read_text().replace("fox jumps", "fox sits"))
    done = answer(*options)
    assert done.code == 2
    assert f"answers.jsonl:{1 if options else 3}" in done.err
    assert (tmp_path / "answers.jsonl").read_bytes() == before


UNTERMINATED = (
    '{"id": 1, "prompt": "a"}',
    '{"id": 1, "te": ',
    '{"id": 2, "text": "a',
    '{"id": "1", "text": "a',
    '{"id": 1, "text": "a", "request": "0"}',
)


@pytest.mark.parametrize(
    "text", ["my thesis", "my thesis\n", '{"id": 1}\n', '{"id": 1, "request": "0"}\n' * 6, "[]\n", *UNTERMINATED]
)
def test_a_file_of_something_else_is_not_touched(answer: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "answers.jsonl").write_text(text)
    done = answer()
    assert done.code == 2
    assert (tmp_path / "answers.jsonl").read_text() == text


def test_a_prompt_too_long_for_the_engine_alone_is_named_before_anything_runs(
    answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cushion_deploy.cli import generate
    from cushion_deploy.runtime import answers

    opened = generate.open_engine

    def short(*arguments: Any) -> Any:
        """Open an engine whose plan was compiled for a shorter context, as TensorRT plans may be."""
        session = opened(*arguments)
        contract = session.contract
        session.contract = dataclasses.replace(contract, max_positions=contract.prefix_length + 20)
        return session

    monkeypatch.setattr(generate, "open_engine", short)
    monkeypatch.setattr(answers, "generate_batch", lambda *_, **__: pytest.fail("the engine has run"))
    done = answer()
    assert done.code == 2, done.err
    assert "prompts.jsonl:2: " in done.err
    assert "more than the 20 that" in done.err
    assert not (tmp_path / "answers.jsonl").exists()


def test_more_than_all_answers_is_not_cut_off(answer: Any, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    assert answer().code == 0
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"id": ')
    assert answer().code == 2
    assert file.read_bytes() == whole + b'{"id": '


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_the_input_is_not_the_output(answer: Any, source: Path, tmp_path: Path, link: str | None) -> None:
    text = '{"id": 1, "prompt": "a"}'
    source.write_text(text)
    output = source
    if link:
        output = tmp_path / "same.jsonl"
        getattr(output, link)(source)
    done = answer(output=output)
    assert done.code == 2, done.err
    assert "are the same file" in done.err
    assert source.read_text() == text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("folder", "is a folder, expected the name of a file"),
        ("pipe", "is not a plain file"),
        ("nowhere", "is not a plain file"),
        ("long", "is too long"),
    ],
)
def test_an_output_that_is_no_file_is_named(answer: Any, tmp_path: Path, kind: str, words: str) -> None:
    output = tmp_path / ("x" * 300 if kind == "long" else "out")
    if kind == "folder":
        output.mkdir()
    elif kind == "pipe":
        os.mkfifo(output)
    elif kind == "nowhere":
        output.symlink_to(tmp_path / "gone")
    done = answer(output=output)
    assert done.code == 2, done.err
    assert words in done.err
    assert "Traceback" not in done.err


def test_an_output_that_cannot_be_read_is_named(answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "answers.jsonl", Path.read_bytes
    file.write_text("x")

    def refused(self: Path) -> bytes:
        if self == file:
            raise PermissionError(13, "Permission denied", str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", refused)
    done = answer()
    assert done.code == 2, done.err
    assert f"cannot read {file}: Permission denied" in done.err


BAD = {
    "no json": ('{"prompt": ', ":3: not valid JSON"),
    "no object": ("3", ":3: int, expected an object"),
    "neither": ('{"id": 3}', ":3: expected either"),
    "both": ('{"prompt": "a", "messages": []}', ":3: expected either"),
    "unknown": ('{"prompt": "a", "temprature": 1}', ":3: unknown field 'temprature'"),
    "prompt": ('{"prompt": 3}', ":3: the prompt is int"),
    "messages": ('{"messages": "hi"}', ":3: messages is str"),
    "no message": ('{"messages": []}', ":3: the conversation has no message"),
    "content": ('{"messages": [{"role": "user", "content": 3}]}', ":3: the content of message 1 is int"),
    "id": ('{"prompt": "a", "id": 1.5}', ":3: the id is float"),
    "twice": ('{"prompt": "a", "id": 1}', ":3: the id 1 is also that of"),
    "empty": ('{"prompt": ""}', ":3: the prompt has no token"),
    "surrogate": ('{"prompt": "\\ud800"}', ":3: not valid JSON"),
    "long": (json.dumps({"prompt": "fox " * 400}), ":3: "),
}


@pytest.mark.parametrize(("line", "words"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_before_an_engine_is_opened(
    answer: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, words: str
) -> None:
    source.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    monkeypatch.setattr("cushion_deploy.cli.generate.open_engine", lambda *_: pytest.fail("an engine was opened"))
    done = answer()
    assert done.code == 2, done.err
    assert f"prompts.jsonl{words}" in done.err
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--input", "p"], "--input was given without --output"),
        (["--output", "p"], "--output was given without --input"),
        (["--batch", "2"], "--batch was given without --input"),
        (["--input", "p", "--output", "q", "--chat"], "--chat cannot be combined"),
        (["--input", "p", "--output", "q", "--draft", "ngram"], "--draft cannot be combined"),
        (["--input", "p", "--output", "q", "hello"], "PROMPT cannot be combined"),
        (["--input", "gone.jsonl", "--output", "q"], "cannot read gone.jsonl"),
        (["--input", "p", "--output", "gone/q"], "does not exist"),
    ],
)
def test_options_that_do_not_go_together(cli: Any, planted_bundle: Any, options: list[str], words: str) -> None:
    done = cli("generate", planted_bundle.bundle, *options)
    assert done.code == 2
    assert words in done.err
