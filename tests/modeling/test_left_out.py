"""What is left out of a checkpoint is known to be harmless; everything else that is not used is an error."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.errors import ExitCode, UsageError
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.recipe import Compute

IDS = np.random.default_rng(6).integers(3, 320, (1, 16))
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny folder, to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def write(folder: Path, tensors: dict[str, torch.Tensor | None]) -> Path:
    """Add, replace or remove (None) tensors of a folder."""
    found = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({n: t.contiguous() for n, t in found.items() if t is not None}, folder / "model.safetensors")
    return folder


def logits_of_transformers(folder: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return np.asarray(oracle(torch.from_numpy(IDS)).logits.numpy())


def refused(folder: Path, compute: Compute | None = None) -> UsageError:
    source = resolve_source(str(folder))
    with pytest.raises(UsageError) as e:
        load_folder(folder, source, **({"compute": compute} if compute else {}))
    assert e.value.exit_code == ExitCode.USAGE
    return e.value


HARMLESS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": False,
    "rotary_emb.inv_freq": False,
    "model.layers.1.self_attn.rotary_emb.cos_cached": False,
    "model.layers.1.attn.masked_bias": False,
    "model.embeddings.position_ids": False,
    "model.layers.1.self_attn.k_proj.k_scale": False,
    "model.layers.1.mlp.up_proj.input_scale": False,
    "vision_tower.encoder.layers.0.weight": True,
    "model.visual.blocks.0.bias": True,
    "mtp.layers.0.mlp.up_proj.weight": True,
    "v_head.summary.weight": True,
}


@pytest.mark.parametrize(("name", "told"), HARMLESS.items())
def test_what_changes_nothing_is_left_out(
    name: str, told: bool, folder: Path, tiny_model: object, caplog: pytest.LogCaptureFixture
) -> None:
    expected = logits_of_transformers(folder)
    write(folder, {name: torch.full((3,), 7.0)})
    with caplog.at_level(logging.WARNING):
        model = load_folder(folder, resolve_source(str(folder)))
    np.testing.assert_allclose(model.logits(IDS, Prefix.empty(model.spec)), expected, atol=1e-5)
    assert ("left out" in caplog.text) == told


REFUSED = {
    "model.layers.1.self_attn.q_proj.bias": "attention_bias",
    "model.layers.1.mlp.gate.weight": "same model",
    "model.layers.3.mlp.up_proj.weight": "num_hidden_layers",
    "model.layers.1.mlp.up_proj.lora_A.weight": "merge",
    "model.layers.1.mlp.up_proj.scales": "floating-point",
    "model.layers.1.self_attn.sinks": "same model",
    "model.layers.1.self_attn.q_norm.weight": "same model",
}


@pytest.mark.parametrize(("name", "hint"), REFUSED.items())
def test_what_could_change_the_model_is_refused_with_its_name(name: str, hint: str, folder: Path) -> None:
    error = refused(write(folder, {name: torch.full((3,), 7.0)}))
    assert name in error.message
    assert hint in error.hint


def test_a_bias_that_is_zero_changes_nothing(folder: Path) -> None:
    write(folder, {"model.layers.1.self_attn.q_proj.bias": torch.zeros(64)})
    load_folder(folder, resolve_source(str(folder)))


def test_a_tensor_that_is_there_twice_is_refused(folder: Path) -> None:
    name = EMBEDDING.removeprefix("model.")
    error = refused(write(folder, {name: torch.ones(320, 64)}))
    assert "twice" in error.message


def test_a_head_beside_a_tied_embedding_is_used_as_transformers_does(
    tiny_writer: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_writer(tmp_path, tie_word_embeddings=True)
    write(folder, {HEAD: torch.randn(320, 64)})
    expected = logits_of_transformers(folder)
    with caplog.at_level(logging.WARNING):
        model = load_folder(folder, resolve_source(str(folder)))
    np.testing.assert_allclose(model.logits(IDS, Prefix.empty(model.spec)), expected, atol=1e-4)
    assert not model.spec.tied_head
    assert not model.module.config.tie_word_embeddings
    assert HEAD in model.weights.names()
    assert "tie_word_embeddings" in caplog.text


@pytest.mark.parametrize("missing", [HEAD, EMBEDDING, None])
def test_a_tied_head_may_be_there_once_or_twice(
    missing: str | None, tiny_writer: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_writer(tmp_path, tie_word_embeddings=True)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    write(folder, {HEAD: embedding.clone(), **({missing: None} if missing else {})})
    expected = logits_of_transformers(folder)
    model = load_folder(folder, resolve_source(str(folder)))
    np.testing.assert_allclose(model.logits(IDS, Prefix.empty(model.spec)), expected, atol=1e-4)
    assert isinstance(model.module.lm_head, nn.Linear)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert HEAD not in model.weights.names()


def test_a_missing_head_that_is_not_tied_names_the_setting(folder: Path) -> None:
    error = refused(write(folder, {HEAD: None}))
    assert HEAD in error.message
    assert "tie_word_embeddings" in error.hint


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [UP, HEAD, "model.norm.weight"])
def test_a_weight_that_is_no_number_is_named_with_its_place(name: str, value: float, folder: Path) -> None:
    tensor = load_file(folder / "model.safetensors")[name].clone()
    place = [3] * tensor.dim()
    tensor[tuple(place)] = value
    error = refused(write(folder, {name: tensor}))
    assert f"{name}{place} is {value}" in error.message


def test_a_weight_that_a_type_cannot_hold_is_named(folder: Path) -> None:
    tensor = load_file(folder / "model.safetensors")[UP].clone()
    tensor[2, 5] = 1e6
    write(folder, {UP: tensor})
    load_folder(folder, resolve_source(str(folder)))
    error = refused(folder, Compute(device="cpu", dtype="float16"))
    assert f"{UP}[2, 5] is 1e+06" in error.message
    assert "bf16" in error.hint
