"""What ``--model`` may name, and how everything else is refused before torch opens it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cushion_deploy.core.weights import whole
from cushion_deploy.errors import CushionError, ExitCode, UntrustedArtifact, UsageError
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import ModelSource, resolve_source
from cushion_deploy.store import digest_cache

Shard = Callable[[Path], None]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny folder, to be damaged."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def shard(folder: Path) -> None:
    """Split model.safetensors in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, chosen in parts.items():
        save_file({n: tensors[n] for n in chosen}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, chosen in parts.items() for n in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def refused(model: Path | str, code: ExitCode) -> CushionError:
    """Return the error that resolving and, if that succeeds, loading ends in; it must carry ``code`` and a hint."""

    def use() -> None:
        source = resolve_source(str(model))
        load_folder(source.path, source)

    with pytest.raises(CushionError) as e:
        use()
    assert e.value.exit_code == code, e.value.message
    assert e.value.hint
    return e.value


def test_a_folder_is_recognized(tiny_folder: Path) -> None:
    source = resolve_source(str(tiny_folder))
    assert (source.kind, source.path, source.label, source.revision) == ("folder", tiny_folder, str(tiny_folder), None)


def test_a_home_relative_path_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_source("~/model").path == folder


def test_a_gguf_file_is_recognized_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "weights.of.some.name"
    file.write_bytes(b"GGUF" + bytes(20))
    assert resolve_source(str(file)).kind == "gguf"


def digests(folder: Path) -> tuple[str, str]:
    source = resolve_source(str(folder))
    return source.digest, source.generation_digest


def test_the_digest_follows_every_byte_that_decides_the_numbers(folder: Path) -> None:
    found = [digests(folder)]

    def now() -> None:
        found.append(digests(folder))

    edit_config(folder, rms_norm_eps=1e-3)
    now()
    with (folder / "model.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x55")
    now()
    (folder / "tokenizer_config.json").write_text("{}")
    now()
    (folder / "tokenizer.json").write_text("{}")
    now()
    assert len({digest for digest, _ in found}) == 5
    assert len({generation for _, generation in found}) == 1
    (folder / "README.md").write_text("words")
    assert digests(folder) == found[-1]


NUMBERS = (
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json"),
    *("special_tokens_map.json", "tokenizer.4.0.0.json", "spiece.model"),
)
GENERATION = (
    *("generation_config.json", "chat_template.jinja", "chat_template.json"),
    "additional_chat_templates/tool_use.jinja",
)


@pytest.mark.parametrize("name", [*NUMBERS, *GENERATION])
def test_every_file_that_loading_reads_is_in_one_of_the_digests(folder: Path, name: str) -> None:
    changed = name in GENERATION
    found = [digests(folder)]
    (folder / name).parent.mkdir(exist_ok=True)
    for text in ('{"of": "another"}', '{"of": "one more"}'):
        (folder / name).write_text(text)
        found.append(digests(folder))
    assert len({both[changed] for both in found}) == 3
    assert len({both[not changed] for both in found}) == 1


def test_a_template_inside_the_tokenizer_config_decides_no_number(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert "chat_template" not in settings
    found = [digests(folder)]
    for template in ("{{ a }}", "{{ b }}", [{"name": "default", "template": "{{ b }}"}]):
        file.write_text(json.dumps({**settings, "chat_template": template}))
        found.append(digests(folder))
    assert len({digest for digest, _ in found}) == 1
    assert len({generation for _, generation in found}) == 4
    file.write_text(json.dumps({**settings, "chat_template": None}, indent=8))
    assert digests(folder) == found[0]
    file.write_text(json.dumps({**settings, "add_bos_token": False}))
    assert digests(folder)[0] != found[0][0]


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_tokenizer_config_that_is_no_json_object_is_damaged(folder: Path, text: str) -> None:
    (folder / "tokenizer_config.json").write_text(text)
    assert "tokenizer_config.json" in refused(folder, ExitCode.UNTRUSTED).message


def test_a_gguf_file_is_one_whole(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + bytes(20))
    source = resolve_source(str(file))
    assert source.digest == source.generation_digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_checkpoint_is_read_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUSHION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "SETTLED_NS", -1_000_000_000)
    first = resolve_source(str(folder))

    def read(path: Path) -> str:
        pytest.fail(f"{path} was read again")

    with monkeypatch.context() as patch:
        patch.setattr(digest_cache, "hash_file", read)
        assert resolve_source(str(folder)) == first
    shutil.rmtree(tmp_path / "cache")
    assert resolve_source(str(folder)) == first


def test_beside_an_index_the_whole_file_is_what_is_loaded_and_hashed(folder: Path, tiny_folder: Path) -> None:
    shard(folder)
    first = folder / "model-00001-of-00002.safetensors"
    save_file({n: t + 1 for n, t in load_file(first).items()}, first, {"format": "pt"})
    sharded = resolve_source(str(folder)).digest
    shutil.copy(tiny_folder / "model.safetensors", folder)
    source = resolve_source(str(folder))
    assert source.digest != sharded
    loaded = load_folder(folder, source)
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        np.testing.assert_array_equal(whole(loaded.weights, name), tensor)
        np.testing.assert_array_equal(loaded.module.state_dict()[name].numpy(), tensor)
    with (folder / "model.safetensors").open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\x55")
    assert resolve_source(str(folder)).digest != source.digest


def test_a_config_that_names_other_weights_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")
    assert "other.safetensors" in refused(folder, ExitCode.USAGE).message


def test_the_digest_does_not_depend_on_where_the_folder_lies(tiny_folder: Path, folder: Path) -> None:
    assert resolve_source(str(folder)).digest == resolve_source(str(tiny_folder)).digest


def test_a_sharded_folder_loads_like_the_whole_one(folder: Path, tiny_folder: Path) -> None:
    shard(folder)
    loaded = load_folder(folder, resolve_source(str(folder)))
    expected = load_file(tiny_folder / "model.safetensors")
    assert loaded.weights.names() == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(whole(loaded.weights, name), tensor)


@pytest.mark.parametrize("model", ["no/such/path/anywhere", "nothing-here", "missing.gguf", "org/missing.gguf", ""])
def test_a_path_that_does_not_exist_is_bad_usage(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="does not exist") as e:
        resolve_source(model)
    assert "folder" in e.value.hint


def test_a_file_that_is_no_gguf_is_bad_usage(tmp_path: Path) -> None:
    for name, content in (("x.gguf", b"PK\x03\x04rest"), ("empty.gguf", b""), ("notes.txt", b"hello")):
        (tmp_path / name).write_bytes(content)
        error = refused(tmp_path / name, ExitCode.USAGE)
        assert "not a GGUF file" in error.message
        assert name in error.message


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "MODEL.PKL", "weights.h5"])
def test_a_pickle_file_is_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    error = refused(tmp_path / name, ExitCode.UNTRUSTED)
    assert "pickle" in error.message
    assert "safetensors" in error.hint


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_a_folder_with_pickled_weights_alone_is_refused(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert name in refused(folder, ExitCode.UNTRUSTED).message


def test_a_folder_without_config_or_without_weights_is_bad_usage(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no safetensors weights" in refused(folder, ExitCode.USAGE).message
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder, ExitCode.USAGE).message


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff\xfe"])
def test_a_config_that_is_no_json_object_is_damaged(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refused(folder, ExitCode.UNTRUSTED).message


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True},
        {"architectures": ["BertForMaskedLM"], "model_type": "bert"},
        {"architectures": ["LlamaForSequenceClassification"]},
    ],
)
def test_what_is_no_decoder_is_named(folder: Path, config: dict[str, Any]) -> None:
    edit_config(folder, **config)
    error = refused(folder, ExitCode.USAGE)
    assert config["architectures"][0] in error.message
    assert "CausalLM" in error.hint


@pytest.mark.parametrize("model_type", ["gpt_neox", "lama"])
def test_an_unknown_model_type_lists_the_supported_ones(folder: Path, model_type: str) -> None:
    edit_config(folder, model_type=model_type, architectures=None)
    error = refused(folder, ExitCode.USAGE)
    assert model_type in error.message
    assert "llama" in error.hint


WRONG_VALUES: dict[str, dict[str, Any]] = {
    "architectures of numbers": {"architectures": [1]},
    "architectures as text": {"architectures": "LlamaForCausalLM"},
    "a list as model type": {"model_type": ["llama"]},
    "a list as activation": {"hidden_act": ["silu"]},
    "a list as size": {"hidden_size": [64]},
    "a text as flag": {"tie_word_embeddings": "NaN"},
    "a fraction of layers": {"num_hidden_layers": 2.5},
    "a negative size": {"vocab_size": -1},
    "heads that do not divide": {"num_attention_heads": 0},
    "a text as norm": {"rms_norm_eps": "small"},
}


@pytest.mark.parametrize("values", WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_config_with_a_wrong_value_is_bad_usage(folder: Path, values: dict[str, Any]) -> None:
    edit_config(folder, **values)
    assert "\n" not in refused(folder, ExitCode.USAGE).message


def test_an_activation_that_the_graph_cannot_build_is_bad_usage(folder: Path) -> None:
    edit_config(folder, hidden_act="xielu")
    assert "silu" in refused(folder, ExitCode.USAGE).hint


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    error = refused(folder, ExitCode.USAGE)
    assert "model-00002-of-00002.safetensors" in error.message
    assert "model.safetensors.index.json" in error.message


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_that_points_outside_is_refused(folder: Path, target: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": target}}))
    assert "outside" in refused(folder, ExitCode.UNTRUSTED).message


@pytest.mark.parametrize("weight_map", [["a"], {"a": 3}, "a", None])
def test_an_index_of_the_wrong_shape_is_damaged(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, ExitCode.UNTRUSTED)


@pytest.mark.parametrize("length", [0, 4, 7, 100, -1000, -1])
def test_a_truncated_safetensors_file_is_damaged(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert "damaged" in refused(folder, ExitCode.UNTRUSTED).message


def test_a_missing_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(folder, ExitCode.USAGE).message


def test_weights_of_another_shape_are_bad_usage(folder: Path) -> None:
    edit_config(folder, intermediate_size=80)
    refused(folder, ExitCode.USAGE)


def test_a_folder_without_tokenizer_is_bad_usage(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "tokenizer" in refused(folder, ExitCode.USAGE).message


def test_code_inside_the_folder_never_runs(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w').close()\nclass Evil: pass\n")
    source = resolve_source(str(folder))
    load_folder(source.path, source)
    assert not (tmp_path / "owned").exists()


SCRIPT = """
import sys
from cushion_deploy.errors import CushionError
from cushion_deploy.modeling.source import resolve_source
try:
    source = resolve_source(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
except CushionError as e:
    print(e.message, "|", e.hint)
    sys.exit(int(e.exit_code))
print(source.path, source.label, source.revision, source.digest)
"""


def resolve_offline(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Resolve a hub id in a process of its own: huggingface_hub reads its environment once, at import."""
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        env.pop(name, None)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=120, check=False
    )


def fill_cache(home: Path, tiny_folder: Path) -> Path:
    """Lay a model out as the hub client caches it, and return its snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = home / "hub" / "models--some-org--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(tiny_folder, root / "snapshots" / commit))


def test_a_hub_id_is_found_in_the_local_cache_without_network(tiny_folder: Path, tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, tiny_folder)
    done = resolve_offline(tmp_path, "some-org/tiny", "main")
    assert done.returncode == 0, done.stdout + done.stderr
    path, label, revision, digest = done.stdout.split()
    assert (path, label, revision) == (str(snapshot), "some-org/tiny", "main")
    assert digest == resolve_source(str(tiny_folder)).digest


def test_a_hub_id_that_is_neither_cached_nor_reachable_says_what_to_do(tmp_path: Path) -> None:
    done = resolve_offline(tmp_path, "some-org/absent")
    assert done.returncode == ExitCode.MISSING, done.stdout + done.stderr
    assert "some-org/absent" in done.stdout
    assert "check the network" in done.stdout


def test_a_hub_id_with_pickled_weights_alone_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, tiny_folder)
    (snapshot / "model.safetensors").rename(snapshot / "pytorch_model.bin")
    done = resolve_offline(tmp_path, "some-org/tiny", "main")
    assert done.returncode == ExitCode.USAGE, done.stdout + done.stderr
    assert "some-org/tiny" in done.stdout
    assert "--revision" in done.stdout


def test_a_source_is_a_value() -> None:
    one, other = (ModelSource("gguf", Path("a"), "a", None, "d", "g") for _ in range(2))
    assert one == other
    assert issubclass(UntrustedArtifact, CushionError)
