"""`generate`: the runtime's own answer, streamed, reproducible, with no torch in the process."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import pytest

from cushion_deploy.cli.main import run
from cushion_deploy.runtime import OnnxRuntimeSession, load, open_bundle

PROMPT = "A head attends"
DRIVER = """
import sys
from cushion_deploy.cli.main import run
code = run(sys.argv[1:])
print(sorted({"torch", "transformers", "onnx", "onnx_ir", "matplotlib"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def prompt_ids(bundle: Any, prompt: str) -> list[int]:
    """Return the prompt as the bundle was calibrated: behind a prefix without the tokenizer's own ``<s>``."""
    opened = open_bundle(bundle)
    return list(opened.tokenizer.encode(prompt, add_special_tokens=opened.contract.prefix_length == 0).ids)


def greedy(bundle: Any, prompt: str, count: int) -> list[int]:
    """Decode by hand: the whole text is run again for every token, so that no cache takes part."""
    opened = open_bundle(bundle)
    session = OnnxRuntimeSession(opened.model_path, opened.contract)
    ids = prompt_ids(bundle, prompt)
    new: list[int] = []
    for _ in range(count):
        session.reset()
        logits = session.run(np.asarray([ids + new]), need_logits="last")
        new.append(int(np.argmax(logits[0, -1])))
        if new[-1] in opened.eos_token_ids:
            break
    return new


@pytest.mark.parametrize("which", ["tiny_bundle", "planted_bundle"])
def test_greedy_is_the_argmax_of_the_graph(cli: Any, request: pytest.FixtureRequest, which: str) -> None:
    bundle = request.getfixturevalue(which).bundle
    done = cli("generate", bundle, PROMPT, "--max-new-tokens", 8, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["token_ids"] == greedy(bundle, PROMPT, 8)
    assert done.json["usage"]["prompt_tokens"] == len(prompt_ids(bundle, PROMPT))


def test_it_equals_the_runtime(cli: Any, planted_bundle: Any) -> None:
    expected = load(planted_bundle.bundle).generate(PROMPT, max_new_tokens=8)
    done = cli("generate", planted_bundle.bundle, PROMPT, "--max-new-tokens", 8, "--json").json
    assert (done["text"], tuple(done["token_ids"])) == (expected.text, expected.token_ids)
    assert done["finish_reason"] == expected.finish_reason


def test_text_is_streamed_behind_the_prompt(cli: Any, planted_bundle: Any) -> None:
    pieces: list[str] = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            pieces.append(text)
            return super().write(text)

    with redirect_stdout(Stream()) as out:
        assert run(["generate", str(planted_bundle.bundle), PROMPT, "--max-new-tokens", "24"]) == 0
    events = [e.text for e in load(planted_bundle.bundle).stream(PROMPT, max_new_tokens=24) if e.text]
    assert len(events) > 1
    assert [p for p in pieces if p] == [PROMPT, *events, "\n"]
    whole = cli("generate", planted_bundle.bundle, PROMPT, "--max-new-tokens", 24, "--json").json["text"]
    assert out.getvalue() == f"{PROMPT}{whole}\n"


def test_the_prompt_may_come_from_stdin(cli: Any, planted_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    options = ["--max-new-tokens", 4, "--json"]
    piped = cli("generate", planted_bundle.bundle, *options).json
    assert piped["token_ids"] == cli("generate", planted_bundle.bundle, PROMPT, *options).json["token_ids"]


def test_a_seed_makes_sampling_reproducible(cli: Any, planted_bundle: Any) -> None:
    def sample(seed: int) -> list[int]:
        options = ["--temperature", 3, "--top-k", 100, "--top-p", 0.99, "--seed", seed, "--max-new-tokens", 12]
        ids: list[int] = cli("generate", planted_bundle.bundle, PROMPT, *options, "--json").json["token_ids"]
        return ids

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_a_stop_text_ends_it(cli: Any, planted_bundle: Any) -> None:
    whole = cli("generate", planted_bundle.bundle, PROMPT, "--max-new-tokens", 12, "--json").json["text"]
    stop = next(c for c in whole if c.isascii() and c.isprintable())
    done = cli("generate", planted_bundle.bundle, PROMPT, "--max-new-tokens", 12, "--stop", stop, "--json").json
    assert done["text"] == whole.partition(stop)[0]
    assert done["finish_reason"] == "stop"


def test_chat_applies_the_template(cli: Any, planted_bundle: Any) -> None:
    options = ["--max-new-tokens", 4, "--json"]
    chat = cli("generate", planted_bundle.bundle, "Hi", "--chat", "--system", "Be kind.", *options)
    assert chat.code == 0, chat.err
    rendered = "<|system|>Be kind.</s>\n<|user|>Hi</s>\n<|assistant|>"
    tokenizer = open_bundle(planted_bundle.bundle).tokenizer
    expected = len(tokenizer.encode(rendered, add_special_tokens=False).ids)
    assert chat.json["usage"]["prompt_tokens"] in (expected, expected + 1)


@pytest.mark.parametrize(
    "options",
    [
        ["--system", "Be kind."],
        ["--max-new-tokens", "0"],
        ["--max-new-tokens", "100000"],
        ["--temperature", "-1"],
        ["--top-p", "0"],
        ["--stop", ""],
        ["--threads", "-2"],
    ],
)
def test_bad_options_are_refused_in_words(cli: Any, planted_bundle: Any, options: list[str]) -> None:
    done = cli("generate", planted_bundle.bundle, PROMPT, *options)
    assert done.code == 2, (done.out, done.err)
    assert "  -> " in done.err or "Error: " in done.err
    assert "Traceback" not in done.err


def test_no_heavy_library_is_in_the_process(python: Any, planted_bundle: Any) -> None:
    done = python(DRIVER, "generate", planted_bundle.bundle, "--max-new-tokens", 4, stdin=PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT)
    assert done.stderr == "[]\n"
