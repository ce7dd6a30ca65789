"""`chat`: through a pipe and in a terminal, with answers that equal the runtime's own."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.cli.terminal import echo_generated
from cushion_deploy.runtime import load
from cushion_deploy.runtime.generate import TextStream

# Each token takes a moment, and stderr says when an answer is under way.
SLOW = """
import sys, time
from cushion_deploy.runtime.decoding import Decoding
from cushion_deploy.cli.main import main
fast = Decoding.next
def slow(self, room):
    print("<token>", file=sys.stderr, flush=True)
    time.sleep(0.1)
    return fast(self, room)
Decoding.next = slow
main()
"""

# Two messages end in errors: one of the chat template, one of the engine.
FAILING = """
from cushion_deploy.cli.main import main
from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.runtime.conversation import Conversation
real = Conversation.answer
def answer(self, text):
    if text == "refuse":
        raise UsageError("the template says \\x1b]0;owned\\x07\\u200f", hint="ask something else")
    if text == "fail":
        raise CheckFailed("a logit is NaN", hint="take another engine")
    return real(self, text)
Conversation.answer = answer
main()
"""


@pytest.fixture
def piped(cli: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def run(bundle: Path, lines: list[str], *options: object) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode())))
        return cli("chat", bundle, "--max-new-tokens", 5, *options)

    return run


def answers(bundle: Path, texts: list[str], system: str | None = None) -> list[str]:
    """Return the answers to messages that are asked one after the other, each with a fresh cache."""
    generator, messages, found = load(bundle), [], []
    if system:
        messages.append({"role": "system", "content": system})
    for text in texts:
        messages.append({"role": "user", "content": text})
        found.append(generator.chat(messages, max_new_tokens=5).text)
        messages.append({"role": "assistant", "content": found[-1]})
    return found


@pytest.mark.parametrize("which", ["tiny_bundle", "planted_bundle"])
def test_each_line_is_a_message_and_stdout_the_answers(piped: Any, request: Any, which: str) -> None:
    bundle = request.getfixturevalue(which).bundle
    done = piped(bundle, ["Hi", "", "And then?"], "--system", "Be kind.")
    assert (done.code, done.err) == (0, "")
    assert done.out == "".join(f"{a}\n" for a in answers(bundle, ["Hi", "And then?"], "Be kind."))


def test_commands_of_a_conversation(piped: Any, planted_bundle: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    lines = ["Hi", "/forget", "/system Be kind.", "//etc", f"/save {file}", "/system", "/help", "/exit", "never asked"]
    done = piped(planted_bundle.bundle, lines)
    assert done.code == 0, done.err
    first, second = answers(planted_bundle.bundle, ["Hi"]), answers(planted_bundle.bundle, ["/etc"], "Be kind.")
    assert done.out == f"{first[0]}\n{second[0]}\n"
    assert json.loads(file.read_text())["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "/etc"},
        {"role": "assistant", "content": second[0]},
    ]
    assert "/save FILE" in done.err


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["/forget all"], "/forget has 'all'"),
        (["/forget " + "9" * 5000], "/forget has '999"),
        (["/quit"], "no command '/quit'"),
        (["/save"], "/save has no file"),
        (["word " * 400], "conversation has"),
    ],
)
def test_an_error_ends_a_pipe(piped: Any, planted_bundle: Any, lines: list[str], words: str) -> None:
    done = piped(planted_bundle.bundle, [*lines, "Hi"])
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert "  -> " in done.err


def test_a_prompt_in_a_terminal_does_not_go_into_a_file(planted_bundle: Any) -> None:
    done = in_terminal("from cushion_deploy.cli.main import main; main()", planted_bundle.bundle, ["Hi", "/exit"])
    assert (done.returncode, done.stdout) == (0, f"{answers(planted_bundle.bundle, ['Hi'])[0]}\n")
    assert done.stderr.startswith("/help lists the commands.\n> ")


push = TextStream.push


def endless(stream: TextStream, token: int) -> Any:
    """Push a token that no end token is recognized in."""
    stream._stop_ids = frozenset()
    return push(stream, token)


@pytest.mark.parametrize(("most", "told"), [(10**6, True), (5, False)])
def test_an_answer_that_ends_with_the_context_says_so(
    cli: Any, tiny_bundle: Any, monkeypatch: pytest.MonkeyPatch, most: int, told: bool
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi\n")))
    # No token ends the answer before.
    monkeypatch.setattr(TextStream, "push", endless)
    done = cli("chat", tiny_bundle.bundle, "--max-new-tokens", most)
    assert done.code == 0, done.err
    assert ("cut off: the model has no room for more" in done.err) == told


def test_a_draft_changes_no_answer(piped: Any, planted_bundle: Any) -> None:
    lines = ["Hi", "Hi", "Hi"]
    plain = piped(planted_bundle.bundle, lines)
    assert piped(planted_bundle.bundle, lines, "--draft", "ngram").out == plain.out
    assert piped(planted_bundle.bundle, lines, "--draft", "medusa").code == 2


@pytest.mark.parametrize(
    ("terminal", "text", "shown"),
    [
        (True, "a\tb\n\x1b[2J\x9b2J\r\x07\u202eé中", "a\tb\n‹U+001B›[2J‹U+009B›2J‹U+000D›‹U+0007›‹U+202E›é中"),
        (False, "a\tb\n\x9b2J\r\x07\u202eé中", "a\tb\n\x9b2J\r\x07\u202eé中"),
    ],
)
def test_a_model_does_not_control_the_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, text: str, shown: str
) -> None:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", out)
    echo_generated(text)
    assert out.getvalue() == shown


def test_an_error_in_a_terminal_does_not_control_it_and_loses_no_conversation(
    planted_bundle: Any, tmp_path: Path
) -> None:
    file = tmp_path / "c.jsonl"
    lines = ["Hi", "refuse", "fail", f"/save {file}", "/exit"]
    done = in_terminal(FAILING, planted_bundle.bundle, lines)
    assert done.returncode == 0, done.stderr
    assert not set(done.stderr) & {"\x1b", "\x07", "\u200f"}
    assert "error: the template says ‹U+001B›]0;owned‹U+0007›‹U+200F›" in done.stderr
    assert "error: a logit is NaN\n  -> take another engine" in done.stderr
    assert json.loads(file.read_text())["messages"][0] == {"role": "user", "content": "Hi"}


def in_terminal(program: str, bundle: Path, lines: list[str]) -> subprocess.CompletedProcess[str]:
    """Run `chat` with a terminal as stdin, in which the lines are typed."""
    ours, theirs = pty.openpty()
    os.write(ours, "".join(f"{line}\n" for line in lines).encode())
    command = [sys.executable, "-c", program, "chat", str(bundle), "--max-new-tokens", "5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(command, stdin=theirs, capture_output=True, text=True, env=environment, timeout=120)


def test_in_a_terminal_ctrl_c_stops_the_answer_and_errors_do_not_end_it(planted_bundle: Any, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SLOW, "chat", str(planted_bundle.bundle), "--max-new-tokens", "100"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None

        def until(words: str) -> None:
            while words not in (line := process.stderr.readline()):
                assert line, "the program has ended"

        try:
            until("/help lists")
            os.write(ours, b"/quit\n")
            until("there is no command '/quit'")
            os.write(ours, b"Hi\n")
            for _ in range(5):
                until("<token>")
            process.send_signal(signal.SIGINT)
            until("[stopped]")
            os.write(ours, f"/save {file}\n".encode())
            until("2 messages written")
            os.write(ours, b"/exit\n")
            process.wait(60)
        finally:
            process.kill()
    assert process.returncode == 0
    whole = load(planted_bundle.bundle).chat([{"role": "user", "content": "Hi"}], max_new_tokens=100).text
    kept = json.loads(file.read_text())["messages"][1]["content"]
    assert 0 < len(kept) < len(whole)
    assert whole.startswith(kept)
