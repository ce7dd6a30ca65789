"""A bundle runs in runtimes that have never heard of it, with the same greedy tokens or logits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from cushion_deploy.engines.onnxruntime.session import open_session
from cushion_deploy.runtime.bundle import open_bundle

PROMPT = np.array([[5, 80, 7, 33, 120, 64, 9]], dtype=np.int64)
TOKENS = 12


def greedy(bundle: Path) -> list[int]:
    """Return the greedy tokens of our own session."""
    opened = open_bundle(bundle)
    session = open_session(opened.graph)
    found, ids = [], PROMPT
    for _ in range(TOKENS):
        logits = session.run(ids)
        assert logits is not None
        found.append(int(logits[0, -1].argmax()))
        ids = np.array([[found[-1]]], dtype=np.int64)
    return found


def plain_feed(inputs: Any) -> dict[str, Any]:
    """Return the inputs of a decoder export for the prompt, as anyone would feed them."""
    feed: dict[str, Any] = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in inputs if i.name.startswith("past")
    }
    n = PROMPT.shape[1]
    return feed | {
        "input_ids": PROMPT,
        "attention_mask": np.ones((1, n), np.int64),
        "position_ids": np.arange(n, dtype=np.int64)[None],
    }


def plain_session(path: Path, *, exact: bool = True) -> Any:
    options = ort.SessionOptions()
    # On processors without an INT8 dot product the usual kernels saturate, whoever runs them.
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def test_plain_onnxruntime(planted_bundle: Any) -> None:
    session = plain_session(planted_bundle.bundle / "model.onnx")
    feed, found = plain_feed(session.get_inputs()), []
    names = [o.name for o in session.get_outputs()]
    for _ in range(TOKENS):
        out = dict(zip(names, session.run(names, feed), strict=True))
        found.append(int(out.pop("logits")[0, -1].argmax()))
        feed = {name.replace("present", "past_key_values"): value for name, value in out.items()}
        total = next(iter(feed.values())).shape[2] + 1
        feed["input_ids"] = np.array([[found[-1]]], np.int64)
        feed["attention_mask"] = np.ones((1, total), np.int64)
        feed["position_ids"] = np.array([[total - 1]], np.int64)
    assert found == greedy(planted_bundle.bundle)


def test_onnxruntime_genai_reads_its_own_description(planted_bundle: Any) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(planted_bundle.bundle))
    settings = og.GeneratorParams(model)
    settings.set_search_options(max_length=PROMPT.shape[1] + TOKENS, do_sample=False)
    generator = og.Generator(model, settings)
    generator.append_tokens(PROMPT.astype(np.int32))
    expected, found = greedy(planted_bundle.bundle), []
    while not generator.is_done() and len(found) < TOKENS:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == expected[: len(found)]
    assert len(found) == TOKENS or found[-1] == 2, "it stopped without an end"


def test_openvino_reads_the_graph_itself(planted_bundle: Any) -> None:
    ov = pytest.importorskip("openvino", reason="openvino is not installed")
    path = planted_bundle.bundle / "model.onnx"
    exact, fast = (plain_session(path, exact=exact) for exact in (True, False))
    feed = plain_feed(exact.get_inputs())
    expected, saturated = (session.run(["logits"], feed)[0] for session in (exact, fast))
    core = ov.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    if "logits_start" in {name for given in compiled.inputs for name in given.names}:
        feed["logits_start"] = np.zeros(1, np.int64)
    found = compiled(feed)[compiled.output("logits")]
    # OpenVINO has no exact kernel for processors without an INT8 dot product: there its sums saturate as the fast ones
    # of ONNX Runtime do. A code may fall on the other side of a tie, which is a few steps of a logit.
    nearest = min(np.abs(found - logits).max() for logits in (expected, saturated))
    assert nearest <= 0.02 * np.abs(expected).max()


@pytest.fixture
def through_optimum() -> Callable[..., list[dict[str, Any]]]:
    """Return a function that feeds a bundle prompts through optimum; see ``optimum_greedy.py``."""
    # optimum-onnx wants transformers 4 and this project 5, so it has an environment of its own.
    python = os.environ.get("CUSHION_OPTIMUM_PYTHON")
    if not python:
        pytest.skip("CUSHION_OPTIMUM_PYTHON names no environment with optimum-onnx; `make test` makes one")

    def feed(bundle: Path, *prompts: Any) -> list[dict[str, Any]]:
        script = Path(__file__).with_name("optimum_greedy.py")
        command = [python, str(script), str(bundle), str(TOKENS), *map(json.dumps, prompts)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()[-len(prompts) :]]

    return feed


TEXT, MESSAGES = "The quick brown fox", [{"role": "user", "content": " When nothing else is worth it "}]


def generated(cli: Any, bundle: Path, *arguments: str) -> list[int]:
    """Return the tokens of ``generate``."""
    done = cli("generate", bundle, *arguments, "--max-new-tokens", TOKENS, "--json")
    assert done.code == 0, done.err
    tokens: list[int] = done.json["token_ids"]
    return tokens


def test_optimum_generates_the_same_from_ids_texts_and_conversations(
    through_optimum: Any, planted_bundle: Any, cli: Any
) -> None:
    # The tokenizer of the model puts <s> before a text; behind the prefix, which takes its place, the one of the bundle
    # does not.
    bundle = open_bundle(planted_bundle.bundle)
    of_ids, of_text, of_chat = through_optimum(bundle.path, PROMPT[0].tolist(), TEXT, MESSAGES)
    expected = greedy(bundle.path)
    assert of_ids["tokens"] == expected[: len(of_ids["tokens"])]
    assert len(of_ids["tokens"]) == TOKENS or of_ids["tokens"][-1] == 2, "it stopped without an end"
    assert of_ids["text"]
    assert (of_text["ids"], of_chat["ids"]) == (bundle.encode_prompt(TEXT), bundle.encode_chat(MESSAGES))
    assert 1 not in of_text["ids"] + of_chat["ids"]
    assert of_text["tokens"] == generated(cli, bundle.path, TEXT)
    assert of_chat["tokens"] == generated(cli, bundle.path, MESSAGES[0]["content"], "--chat")


def test_optimum_reads_a_text_as_generate_does_without_a_prefix(
    through_optimum: Any, planted_bundle: Any, tmp_path: Path, cli: Any
) -> None:
    options = ["--no-prefix", "--engine", "onnxruntime", "--output", tmp_path / "bare"]
    assert cli("build", *planted_bundle.options, *options).code == 0
    bundle = open_bundle(tmp_path / "bare")
    of_text, of_chat = through_optimum(bundle.path, TEXT, MESSAGES)
    assert of_text["ids"] == bundle.encode_prompt(TEXT)
    assert of_text["ids"][0] == 1
    assert of_text["tokens"] == generated(cli, bundle.path, TEXT)
    # The template leaves out <s>, and apply_chat_template of transformers does not add it.
    assert [1, *of_chat["ids"]] == bundle.encode_chat(MESSAGES)


@pytest.mark.parametrize("mode", ["baked", "cache"])
def test_polygraphy_finds_nothing_unsupported(planted_bundle: Any, tmp_path: Path, mode: str, cli: Any) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    tool = shutil.which("polygraphy", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("polygraphy is not installed")
    arguments = planted_bundle.options
    done = cli("export", *arguments, "--dtype", "float16", "--set", f"export.prefix={mode}", "-o", tmp_path / "g")
    assert done.code == 0, done.err
    for graph in (tmp_path / "g" / "model.onnx", planted_bundle.bundle / "model.onnx"):
        asked = subprocess.run(
            [tool, "inspect", "capability", str(graph)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1", "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
        )
        assert asked.returncode == 0, asked.stderr
        assert "Graph is fully supported by TensorRT" in asked.stdout + asked.stderr
