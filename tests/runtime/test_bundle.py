"""Bundles: verified first, then read; and a whole generation in a process without torch."""

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
from tokenizers import Tokenizer

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.runtime import load, open_bundle
from cushion_deploy.store import publish, staging_area

ROOT = Path(__file__).parents[2]


@pytest.fixture
def changed(bundle_path: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that publishes the bundle with files replaced (text) or left out (None)."""

    def make(**files: str | None) -> Path:
        out = tmp_path / "changed"
        with staging_area(out) as staged:
            for source in bundle_path.iterdir():
                if source.name != "cushion.json":
                    shutil.copyfile(source, staged / source.name)
            for name, text in files.items():
                (staged / name).unlink(missing_ok=True)
                if text is not None:
                    (staged / name).write_text(text, encoding="utf-8")
            publish(staged, out, {}, {})
        return out

    return make


def test_bundle_holds_what_was_published(bundle_path: Path, tiny: Any) -> None:
    bundle = open_bundle(bundle_path)
    assert bundle.contract == tiny.graph.contract
    assert bundle.model_path == bundle_path / "model.onnx"
    assert bundle.prefix_mode == tiny.graph.contract.prefix_mode
    assert bundle.config["hidden_size"] == 64
    assert (bundle.bos_token_id, bundle.eos_token_ids) == (1, (2,))
    assert bundle.manifest.files["model.onnx"].size == bundle.model_path.stat().st_size


def test_one_flipped_bit_is_found_before_anything_is_read(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = changed()
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (out / "model.onnx.data").write_bytes(data)
    read: list[str] = []
    monkeypatch.setattr(Tokenizer, "from_file", lambda path: read.append(path))
    monkeypatch.setattr("cushion_deploy.runtime.text.open_engine", lambda *a, **k: read.append("engine"))
    with pytest.raises(UntrustedArtifact, match=r"model\.onnx\.data"):
        load(out)
    assert read == []


def test_every_token_that_some_file_names_ends_a_text(changed: Callable[..., Path]) -> None:
    # The tokenizer of the bundle names </s>, token 2.
    changes = {"generation_config.json": '{"eos_token_id": [9, 7]}', "config.json": '{"eos_token_id": 4}'}
    assert open_bundle(changed(**changes)).eos_token_ids == (2, 4, 7, 9)


def test_a_file_that_names_no_end_changes_nothing(changed: Callable[..., Path]) -> None:
    out = changed(**{"generation_config.json": None, "config.json": '{"eos_token_id": 4}'})
    assert open_bundle(out).eos_token_ids == (2, 4)
    assert open_bundle(changed(**{"generation_config.json": "{}", "config.json": "{}"})).eos_token_ids == (2,)


def test_chat_template_of_the_tokenizer_config_serves_without_a_file(changed: Callable[..., Path]) -> None:
    settings = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default", "template": "{{ bos_token }}!"}]}
    out = changed(**{"chat_template.jinja": None, "tokenizer_config.json": json.dumps(settings)})
    assert open_bundle(out).require_chat_template().render([{"role": "user", "content": "x"}]) == "<s>!"


def test_chat_without_a_template_says_so(changed: Callable[..., Path]) -> None:
    out = changed(**{"chat_template.jinja": None, "tokenizer_config.json": "{}"})
    with pytest.raises(UsageError, match="no chat template"):
        load(out, threads=1).chat([{"role": "user", "content": "x"}])


def test_padding_and_truncation_of_the_tokenizer_are_off(changed: Callable[..., Path], tokenizer: Tokenizer) -> None:
    limited = Tokenizer.from_str(tokenizer.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=8)
    bundle = open_bundle(changed(**{"tokenizer.json": limited.to_str()}))
    assert bundle.tokenizer.encode("The quick brown fox").ids == tokenizer.encode("The quick brown fox").ids


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"export.json": None}, "export.json"),
        ({"export.json": "[]"}, "not a JSON object"),
        ({"export.json": '{"path": "model.onnx"}'}, "does not describe a graph"),
        ({"tokenizer.json": "{}"}, "is not a tokenizer"),
        ({"tokenizer.json": None}, "has no tokenizer.json"),
        ({"config.json": None}, "config.json"),
    ],
)
def test_bundle_without_what_it_needs_is_refused(
    changed: Callable[..., Path], files: dict[str, str | None], message: str
) -> None:
    with pytest.raises(UntrustedArtifact, match=message):
        open_bundle(changed(**files))


def test_contract_cannot_lead_out_of_the_bundle(changed: Callable[..., Path], tiny: Any) -> None:
    data = {**tiny.graph.to_json(), "path": "../elsewhere.onnx"}
    with pytest.raises(UntrustedArtifact, match="elsewhere"):
        open_bundle(changed(**{"export.json": json.dumps(data)}))


def test_unknown_engine_lists_the_known(bundle_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown engine 'tpu'") as caught:
        load(bundle_path, engine="tpu")
    assert "onnxruntime" in caught.value.hint


def test_text_in_text_out(bundle_path: Path) -> None:
    generator = load(bundle_path, threads=1)
    result = generator.generate("The quick", max_new_tokens=20)
    events = list(generator.stream("The quick", max_new_tokens=20))
    assert result.text == "".join(e.text for e in events)
    assert result.token_ids == tuple(e.token_id for e in events)
    prompt = generator.bundle.tokenizer.encode("The quick").ids
    whole = generator.bundle.tokenizer.decode([*prompt, *result.token_ids])
    assert whole.startswith("The quick" + result.text)
    assert result.usage.prompt_tokens == len(prompt)


def test_chat_continues_the_rendered_template(bundle_path: Path) -> None:
    generator = load(bundle_path, threads=1)
    messages = [{"role": "user", "content": " The lazy dog "}]
    answer = generator.chat(messages, max_new_tokens=8)
    # transformers' tokens for the same template: the post-processor's <s> would be the second.
    assert (
        answer.token_ids == generator.generate("<s><|user|>The lazy dog</s>\n<|assistant|>", max_new_tokens=8).token_ids
    )


def test_no_heavy_library_is_imported_for_a_whole_generation(bundle_path: Path) -> None:
    code = """
import sys
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "jinja2", "cushion_deploy.families", "cushion_deploy.calib",
         "cushion_deploy.export", "cushion_deploy.modeling")
import cushion_deploy.runtime as runtime
assert "onnxruntime" not in sys.modules
assert not [m for m in HEAVY if m in sys.modules], sorted(sys.modules)
generator = runtime.load(sys.argv[1], threads=1)
print(len(generator.generate("The quick", max_new_tokens=5, params=runtime.SamplingParams(1.0, seed=1)).token_ids))
assert not [m for m in HEAVY if m in sys.modules], sorted(sys.modules)
generator.chat([{"role": "user", "content": "x"}], max_new_tokens=2)
assert not [m for m in HEAVY if m in sys.modules and m != "jinja2"], sorted(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(bundle_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "5\n"
