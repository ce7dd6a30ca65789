"""Checkpoints as people publish them: names without the decoder's prefix, shards, BF16 and FP16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import resolve_source

IDS = np.random.default_rng(2).integers(3, 320, (1, 16))


def rewrite(folder: Path, to: Path, *, dtype: torch.dtype = torch.float32, bare: str = "", shards: int = 1) -> Path:
    """Copy a checkpoint with its tensors in another type, without a prefix of their names, and in several files."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    (to / "model.safetensors").unlink()
    renamed = {name.removeprefix(bare): tensor.to(dtype) for name, tensor in tensors.items()}
    names = sorted(renamed)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: renamed[name] for name in part}, to / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards == 1:
        (to / "model-00001-of-00001.safetensors").rename(to / "model.safetensors")
    else:
        (to / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return to


def float_graph_logits(model: Any, folder: Path) -> np.ndarray:
    import onnxruntime as ort

    folder.mkdir()
    quantization, form = Quantization(Prefix.empty(model.spec), QuantScheme()), GraphForm(quantized=False)
    graph = export_graph(model.spec, model.weights, quantization, form, folder)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
    shape = IDS.shape[1]
    feed = {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    feed |= {"input_ids": IDS, "attention_mask": np.ones((1, shape), np.int64), "position_ids": np.arange(shape)[None]}
    return np.asarray(session.run(["logits"], feed)[0])


@pytest.mark.parametrize(
    ("variant", "bare"),
    [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")],
)
def test_names_without_the_decoders_prefix(variant: str, bare: str, variant_folder: Any, tmp_path: Path) -> None:
    folder = rewrite(variant_folder(variant), tmp_path / "bare", bare=bare)
    model = load_folder(folder, resolve_source(str(folder)))
    assert any(name.startswith(bare) for name in model.weights.names())
    expected = model.logits(IDS, Prefix.empty(model.spec))
    np.testing.assert_allclose(float_graph_logits(model, tmp_path / "graph"), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_in_shards(variant: str, dtype: torch.dtype, variant_folder: Any, tmp_path: Path) -> None:
    folder = rewrite(variant_folder(variant), tmp_path / "half", dtype=dtype, shards=3)
    model = load_folder(folder, resolve_source(str(folder)))
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}
    expected = model.logits(IDS, Prefix.empty(model.spec))
    np.testing.assert_allclose(float_graph_logits(model, tmp_path / "graph"), expected, atol=1e-4)


def test_settings_that_a_family_does_not_cover_are_refused_by_name(variant_folder: Any, tmp_path: Path) -> None:
    from cushion_deploy.errors import UsageError

    for variant, key, value in (
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("bloom", "apply_residual_connection_post_layernorm", True),
        ("opt", "activation_function", "gelu"),
        ("opt", "layer_norm_elementwise_affine", False),
        ("gemma3", "use_bidirectional_attention", True),
    ):
        folder = tmp_path / f"{variant}-{key}"
        shutil.copytree(variant_folder(variant), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(UsageError, match=key):
            resolve_source(str(folder))


PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Phi-3-mini-128k": (
        "phi3",
        {
            "rope_scaling": {"type": "longrope", "short_factor": [1.1] * 8, "long_factor": [2.0] * 8},
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 256,
            "rope_parameters": None,
            "partial_rotary_factor": 1.0,
        },
        {"max_positions": 64},
    ),
    "Qwen2.5 with yarn": (
        "qwen2",
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            "rope_theta": 1e6,
            "rope_parameters": None,
        },
        {"max_positions": 256},
    ),
    "Llama with linear scaling, old spelling": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4, "rope_parameters": None},
        {},
    ),
    "Llama with a stray window": ("llama", {"sliding_window": 4}, {"windows": ()}),
    "Llama with a stray partial rotation": ("llama", {"partial_rotary_factor": 0.5}, {}),
    "GPT-2 without n_inner": ("gpt2", {"n_inner": None}, {"intermediate_size": 256}),
}
"""Model type of the tiny model, keys of its config.json as they are published, and what the spec must say."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_configurations_as_they_are_published(name: str, tiny_writer: Any, tmp_path: Path) -> None:
    model_type, keys, expected = PUBLISHED[name]
    base = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256} if model_type == "gpt2" else {}
    extra = {"n_inner": None} if model_type == "gpt2" else {}
    folder = tiny_writer(tmp_path / "model", None, model_type, **base, **extra)
    config = json.loads((folder / "config.json").read_text())
    kept = {key: value for key, value in {**config, **keys}.items() if not (key in keys and keys[key] is None)}
    (folder / "config.json").write_text(json.dumps(kept))
    model = load_folder(folder, resolve_source(str(folder)))
    for key, value in expected.items():
        assert getattr(model.spec, key) == value
    found = float_graph_logits(model, tmp_path / "graph")
    np.testing.assert_allclose(found, model.logits(IDS, Prefix.empty(model.spec)), atol=1e-4)
