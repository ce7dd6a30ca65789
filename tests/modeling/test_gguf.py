"""A GGUF file becomes the same model as the folder that it was written from; a damaged one is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter, RopeScalingType, TokenType, dequantize
from safetensors.numpy import load_file, save_file

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.weights import whole
from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.modeling.gguf import convert_gguf
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return a query or key weight in GGUF's order: rotary pairs beside each other instead of half a head apart."""
    out, width = weight.shape
    return weight.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2).reshape(out, width)


def write_gguf(
    folder: Path, file: Path, architecture: str = "llama", more: Callable[[GGUFWriter], None] | None = None
) -> Path:
    """Write the tiny folder as a float32 GGUF file; ``more`` adds to it."""
    writer = GGUFWriter(file, architecture)
    if more:
        more(writer)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(3)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(320)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * 317)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, inner = stem.split(".", 3)
            if inner in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = interleaved(tensor, 4 if "q_proj" in inner else 2)
            target = f"blk.{layer}.{NAMES[inner]}"
        else:
            target = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[stem]
        writer.add_tensor(f"{target}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def gguf_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model as a GGUF file."""
    return write_gguf(tiny_folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_the_converted_model_is_the_one_that_was_written(
    gguf_file: Path, tiny_model: TorchRunner, tmp_path: Path
) -> None:
    source = resolve_source(str(gguf_file))
    convert_gguf(source, tmp_path)
    model = load_folder(tmp_path, source)
    for name in tiny_model.weights.names():
        np.testing.assert_array_equal(whole(model.weights, name), whole(tiny_model.weights, name), err_msg=name)
    ids, none = np.arange(3, 40)[None], Prefix.empty(model.spec)
    np.testing.assert_allclose(model.logits(ids, none), tiny_model.logits(ids, none), rtol=1e-5, atol=1e-5)
    text = "The fox attends to the first token."
    assert model.encode(text).tolist() == tiny_model.encode(text).tolist()
    assert (model.spec.source, model.spec.bos_token_id, model.spec.eos_token_ids) == ("tiny.gguf", 1, (2,))
    assert model.spec.weights_digest == source.digest


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (lambda writer: writer.add_rope_scaling_type(RopeScalingType.YARN), "rope.scaling.type"),
        (lambda writer: writer.add_rope_scaling_factor(8.0), "rope.scaling.factor"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "rope_freqs.weight"),
    ],
)
def test_scaled_rotary_positions_are_refused_because_they_would_be_lost(
    more: Any, named: str, tiny_folder: Path, tmp_path: Path
) -> None:
    file = write_gguf(tiny_folder, tmp_path / "scaled.gguf", more=more)
    with pytest.raises(UsageError, match=named) as e:
        convert_gguf(resolve_source(str(file)), tmp_path)
    assert "Hugging Face folder" in e.value.hint


def test_rotary_positions_that_are_said_to_be_unscaled_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    plain = lambda writer: writer.add_rope_scaling_type(RopeScalingType.NONE)  # noqa: E731
    file = write_gguf(tiny_folder, tmp_path / "plain.gguf", more=plain)
    (tmp_path / "out").mkdir()
    convert_gguf(resolve_source(str(file)), tmp_path / "out")


def test_the_folder_holds_no_pickle_and_no_marker_of_quantization(gguf_file: Path, tmp_path: Path) -> None:
    convert_gguf(resolve_source(str(gguf_file)), tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_conversion_reports_its_tensors_and_leaves_stderr_alone(
    gguf_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    seen: list[tuple[str, int, int]] = []
    convert_gguf(resolve_source(str(gguf_file)), tmp_path, lambda *row: seen.append(row))
    tensors = len(GGUFReader(gguf_file).tensors)
    converted = [row[1:] for row in seen if row[0] == "converting GGUF tensors"]
    assert converted == [(done, tensors) for done in range(tensors + 1)]
    assert "it/s" not in capfd.readouterr().err


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_refused(gguf_file: Path, tmp_path: Path, share: float) -> None:
    whole = gguf_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: max(4, int(len(whole) * share))])
    with pytest.raises(UntrustedArtifact, match=r"cut\.gguf is truncated or damaged: (?!cannot reshape)") as e:
        convert_gguf(resolve_source(str(cut)), tmp_path / "out")
    assert "download" in e.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("offset", [4, 8, 16, 24])
def test_a_header_of_nonsense_is_refused(gguf_file: Path, tmp_path: Path, offset: int) -> None:
    # Version, number of tensors, number of fields, length of the first name.
    bad = tmp_path / "bad.gguf"
    shutil.copy(gguf_file, bad)
    with bad.open("r+b") as f:
        f.seek(offset)
        f.write(b"\xff\xff\xff\x7f")
    with pytest.raises(UntrustedArtifact, match="truncated or damaged"):
        convert_gguf(resolve_source(str(bad)), tmp_path / "out")


def test_another_architecture_is_answered_with_the_supported_ones(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_folder, tmp_path / "other.gguf", "mamba")
    with pytest.raises(UsageError, match="'mamba' is not supported") as e:
        convert_gguf(resolve_source(str(file)), tmp_path / "out")
    assert "llama" in e.value.hint


@pytest.mark.model
def test_real_weights_are_those_that_gguf_dequantizes(smollm2_gguf: Path, smollm2: TorchRunner) -> None:
    tensors = {t.name: t for t in GGUFReader(smollm2_gguf).tensors}
    for theirs, ours in (("blk.11.ffn_down", "model.layers.11.mlp.down_proj"), ("output_norm", "model.norm")):
        tensor = tensors[f"{theirs}.weight"]
        expected = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(whole(smollm2.weights, f"{ours}.weight"), expected)
    query = tensors["blk.0.attn_q.weight"]
    expected = interleaved(whole(smollm2.weights, "model.layers.0.self_attn.q_proj.weight"), smollm2.spec.num_heads)
    np.testing.assert_array_equal(expected, dequantize(query.data, query.tensor_type))


@pytest.mark.model
def test_a_real_file_cut_in_the_middle_is_refused(smollm2_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    with smollm2_gguf.open("rb") as f:
        cut.write_bytes(f.read(smollm2_gguf.stat().st_size // 2))
    with pytest.raises(UntrustedArtifact, match="truncated or damaged"):
        convert_gguf(resolve_source(str(cut)), tmp_path / "out")


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.0.attn_q_norm.weight", "blk.1.strange.weight", "strange"])
def test_a_tensor_that_the_architecture_does_not_have_is_refused(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    file = write_gguf(
        tiny_folder, tmp_path / "more.gguf", more=lambda writer: writer.add_tensor(name, np.ones(64, np.float32))
    )
    with pytest.raises(UsageError, match=r"more\.gguf has tensors that .*" + re.escape(name)):
        convert_gguf(resolve_source(str(file)), tmp_path)


def test_a_tensor_that_is_missing_is_not_invented(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "less"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    file = write_gguf(folder, tmp_path / "less.gguf")
    with pytest.raises(UsageError, match=r"lacks tensors: .*layers\.1\.mlp\.up_proj"):
        convert_gguf(resolve_source(str(file)), tmp_path)
