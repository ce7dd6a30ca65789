"""The examples give the tokens of `generate`: the one in C, under sanitizers, and the one in onnxruntime-genai."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.engines.onnxruntime.kernels import UINT8_WEIGHTS, exact_kernels
from cushion_deploy.runtime.bundle import open_bundle

EXAMPLES = Path(__file__).parents[2] / "examples"
SENTENCE = "A few semantically empty tokens become attention sinks. "
SANITIZERS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
TOKENS = 12


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the C example, built by its own Makefile with every warning an error."""
    include = os.environ.get("CUSHION_ORT_INCLUDE") or "/usr/include/onnxruntime"
    if not Path(include, "onnxruntime_c_api.h").is_file():
        pytest.skip(f"{include} has no headers of ONNX Runtime; `make test` fetches them where npm is installed")
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("make or a C compiler is not installed")
    build = tmp_path_factory.mktemp("c")
    options = [f"PYTHON={sys.executable}", f"BUILD={build}", f"ORT_INCLUDE={include}", f"CFLAGS={SANITIZERS}"]
    done = subprocess.run(["make", "-C", EXAMPLES / "c", *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return build / "generate"


@pytest.fixture(scope="module")
def run(program: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def once(*arguments: object) -> subprocess.CompletedProcess[str]:
        # A program that ends with an error leaves its memory to the system; one that succeeds has freed everything.
        leaks = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"} if "--fails" in arguments else None
        command = [str(program), *(str(a) for a in arguments if a != "--fails")]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=leaks)

    return once


def ours(cli: Any, bundle: Path, prompt: str, *more: object) -> Any:
    done = cli("generate", bundle, prompt, "--max-new-tokens", TOKENS, "--json", *more)
    assert done.code == 0, done.err
    return done.json["token_ids"]


@pytest.mark.parametrize("prompt", [SENTENCE, SENTENCE * 8], ids=["sentence", "several chunks"])
def test_the_c_example_gives_the_tokens_of_generate(planted_bundle: Any, cli: Any, run: Any, prompt: str) -> None:
    bundle = planted_bundle.bundle
    ids = open_bundle(bundle).encode_prompt(prompt)
    assert (len(ids) > 128) == (len(prompt) > len(SENTENCE))
    expected = ours(cli, bundle, prompt)
    fast = ["-f"] if exact_kernels()[UINT8_WEIGHTS] == "0" else []
    for options in [["-t", 1], fast] if prompt == SENTENCE else [fast]:
        done = run("-n", TOKENS, *options, bundle, *ids)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert [int(token) for token in done.stdout.split()] == expected


def edited(bundle: Path, name: str, edit: Callable[[Any], object]) -> Path:
    content = json.loads((bundle / name).read_text())
    edit(content)
    (bundle / name).write_text(json.dumps(content))
    return bundle


def test_the_c_example_ends_at_an_end_token(copy: Path, cli: Any, run: Any) -> None:
    ids = open_bundle(copy).encode_prompt(SENTENCE)
    tokens = ours(cli, copy, SENTENCE)
    end = tokens[4]
    for value in (end, [319, end]):
        edited(copy, "genai_config.json", lambda c, v=value: c["model"].update(eos_token_id=v))  # type: ignore[misc]
        done = run("-n", TOKENS, copy, *ids)
        assert [int(token) for token in done.stdout.split()] == tokens[: tokens.index(end) + 1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "usage"),
        (("BUNDLE",), 2, "usage"),
        (("-x", "BUNDLE", 5), 2, "usage"),
        (("-n", 0, "BUNDLE", 5), 2, "the number of tokens is '0'"),
        (("-n", "1e3", "BUNDLE", 5), 2, "the number of tokens is '1e3'"),
        (("-t", "many", "BUNDLE", 5), 2, "the number of threads is 'many'"),
        (("BUNDLE/gone", 5), 2, "No such file"),
        (("BUNDLE", "five"), 2, "a token id is 'five', expected 0 to 319"),
        (("BUNDLE", 320), 2, "a token id is '320'"),
        (("BUNDLE", -1), 2, "a token id is '-1'"),
        (("BUNDLE", ""), 2, "a token id is ''"),
        (("BUNDLE", "9" * 30), 2, "a token id is '999"),
        (("-n", 256, "BUNDLE", 5), 2, "1 prompt tokens and 256 new ones are more than the"),
    ],
)
def test_bad_input_of_the_c_example(tiny_bundle: Any, run: Any, arguments: Any, code: int, words: str) -> None:
    folder = str(tiny_bundle.bundle)
    done = run("--fails", *(str(a).replace("BUNDLE", folder) for a in arguments))
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr


DAMAGE: dict[str, Callable[[Path], object]] = {
    "model.onnx": lambda b: (b / "model.onnx").write_bytes((b / "model.onnx").read_bytes()[:1000]),
    "does not describe a graph": lambda b: (b / "export.json").write_text("[]"),
    "has no eos_token_id or context_length": lambda b: edited(b, "genai_config.json", lambda c: c.pop("model")),
    "no eos_token_id": lambda b: edited(b, "genai_config.json", lambda c: c["model"].update(eos_token_id="2")),
    "is not in its graph": lambda b: edited(b, "export.json", lambda c: c["contract"].update(prefix_in_cache=True)),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_the_c_example_refuses_a_damaged_bundle(copy: Path, run: Any, words: str) -> None:
    DAMAGE[words](copy)
    done = run("--fails", "-n", 1, copy, 5)
    assert (done.returncode, done.stdout) == (4, "")
    assert words in done.stderr


def test_the_c_example_reads_no_byte_beyond_a_description(copy: Path, run: Any) -> None:
    whole = (copy / "genai_config.json").read_bytes()
    hostile = [
        b"[" * 100_000,
        b'{"model":' * 100_000,
        b'{"model": {"eos_token_id": [',
        b'{"model": "\\',
        b'{"a" 1}',
        b"",
    ]
    for text in [*hostile, *(whole[:length] for length in range(1, len(whole) - 1, 100))]:
        (copy / "genai_config.json").write_bytes(text)
        done = run("--fails", "-n", 1, copy, 5)
        assert done.returncode == 4, (text[:40], done.stderr)
        assert "genai_config.json" in done.stderr


def genai(*arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    command = [sys.executable, str(EXAMPLES / "genai" / "generate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("chat", [False, True])
def test_the_genai_example_gives_the_tokens_and_the_text_of_generate(planted_bundle: Any, cli: Any, chat: bool) -> None:
    options = ["--chat"] if chat else []
    bundle = planted_bundle.bundle
    done = genai(bundle, SENTENCE, "-n", TOKENS, "--ids", *options)
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == ours(cli, bundle, SENTENCE, *options)


def test_the_genai_example_adds_bos_where_no_prefix_takes_its_place(copy: Path, cli: Any) -> None:
    from cushion_deploy.store import BundleManifest, FileEntry, hash_file, read_manifest

    (copy / "text.json").write_text('{"keep_bos": true}')
    manifest = read_manifest(copy)
    entry = FileEntry(hash_file(copy / "text.json"), (copy / "text.json").stat().st_size)
    changed = BundleManifest({**manifest.files, "text.json": entry}, manifest.recipe, manifest.parents)
    (copy / "cushion.json").write_bytes(changed.to_bytes())
    assert open_bundle(copy).encode_prompt("a")[0] == 1
    done = genai(copy, SENTENCE, "-n", TOKENS, "--ids")
    assert [int(token) for token in done.stdout.split()] == ours(cli, copy, SENTENCE)


def test_bad_input_of_the_genai_example(tiny_bundle: Any, tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path, "a"), "has no genai_config.json"),
        ((tiny_bundle.bundle, "a", "-n", 1000), "at most"),
        ((tiny_bundle.bundle, "a", "-n", 0), "at least one of each"),
    ):
        done = genai(*arguments)
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr
