"""A loaded model is what the folder says: spec, Sites, weights, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tokenizers import Tokenizer
from torch import nn

from cushion_deploy.core.sites import HEAD_SITE, layer_site
from cushion_deploy.core.weights import whole
from cushion_deploy.errors import UsageError
from cushion_deploy.families import SiteRule, get_family
from cushion_deploy.modeling.checkpoint import Checkpoint
from cushion_deploy.modeling.load import bind_sites, load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source


def test_the_spec_says_what_the_config_said(tiny_model: TorchRunner, tiny_folder: Path) -> None:
    s = tiny_model.spec
    shape = (s.vocab_size, s.hidden_size, s.intermediate_size, s.num_layers, s.num_heads, s.num_kv_heads, s.head_dim)
    assert shape == (320, 64, 96, 3, 4, 2, 16)
    assert (s.family, s.activation, s.tied_head, s.bos_token_id, s.eos_token_ids) == ("llama", "silu", False, 1, (2,))
    assert (s.rotary.theta, s.rotary.rule, s.rotary.parameters) == (10000.0, "default", {})
    assert s.parameters == sum(t.size for t in load_file(tiny_folder / "model.safetensors").values())
    assert s.weights_digest == resolve_source(str(tiny_folder)).digest


def test_the_module_is_float32_frozen_and_in_eval_mode(tiny_model: TorchRunner) -> None:
    assert not tiny_model.module.training
    for p in tiny_model.module.parameters():
        assert p.dtype == torch.float32
        assert not p.requires_grad


def test_every_site_is_bound_to_the_linears_that_read_it(tiny_model: TorchRunner) -> None:
    layer = tiny_model.module.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    assert tiny_model.sites[layer_site(1, "attn.qkv")] == (attention.q_proj, attention.k_proj, attention.v_proj)
    assert tiny_model.sites[layer_site(1, "attn.out")] == (attention.o_proj,)
    assert tiny_model.sites[layer_site(1, "mlp.gate_up")] == (mlp.gate_proj, mlp.up_proj)
    assert tiny_model.sites[layer_site(1, "mlp.down")] == (mlp.down_proj,)
    assert tiny_model.sites[HEAD_SITE] == (tiny_model.module.lm_head,)
    assert len(tiny_model.sites) == 3 * 4 + 1


@pytest.mark.parametrize(("path", "found"), [("mlp.no_proj", "missing"), ("input_layernorm", "LlamaRMSNorm")])
def test_a_site_whose_path_is_missing_or_no_linear_is_refused(tiny_model: TorchRunner, path: str, found: str) -> None:
    family = dataclasses.replace(tiny_model.family, sites=(SiteRule("mlp.down", (path,)),))
    with pytest.raises(UsageError, match=rf"model\.layers\.0\.{path}' is {found}, expected a linear") as e:
        bind_sites(tiny_model.module, family, tiny_model.spec)
    assert "llama" in e.value.hint


def test_an_eos_list_and_a_rotary_rule_reach_the_spec(tiny_writer: Callable[..., Path], tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    folder = tiny_writer(tmp_path, eos_token_id=[2, 7], rope_parameters=rope, tie_word_embeddings=True)
    spec = load_folder(folder, resolve_source(str(folder))).spec
    assert spec.eos_token_ids == (2, 7)
    assert spec.tied_head
    assert (spec.rotary.theta, spec.rotary.rule, spec.rotary.parameters) == (5000.0, "linear", {"factor": 2.0})


def test_a_rotary_rule_that_is_not_built_is_refused(tiny_writer: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_writer(tmp_path, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(UsageError, match="'dynamic' is not supported") as e:
        load_folder(folder, resolve_source(str(folder)))
    assert "linear" in e.value.hint


def test_half_precision_weights_are_widened_exactly(tiny_folder: Path, tmp_path: Path) -> None:
    tensors = load_torch(tiny_folder / "model.safetensors")
    halved = {
        "lm_head.weight": tensors["lm_head.weight"].bfloat16(),
        "model.norm.weight": tensors["model.norm.weight"].half(),
    }
    save_torch(halved, tmp_path / "model.safetensors")
    weights = Checkpoint(tmp_path, get_family("llama"))
    for name, tensor in halved.items():
        array = whole(weights, name)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, tensor.double().numpy())
    with pytest.raises(KeyError):
        whole(weights, "c")


def test_text_is_encoded_as_tokenizers_does_without_special_tokens(tiny_model: TorchRunner, tiny_folder: Path) -> None:
    text = "The fox attends to the first token.\nNaïve — 中文"
    expected = Tokenizer.from_file(str(tiny_folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    ids = tiny_model.encode(text)
    assert ids.dtype == np.int64
    assert ids.tolist() == expected
    assert tiny_model.encode("").tolist() == []


def test_a_token_has_its_text_and_a_special_one_its_name(tiny_model: TorchRunner) -> None:
    assert tiny_model.token_text(1) == "<s>"
    assert tiny_model.token_text(int(tiny_model.encode("x")[0])) == "x"


def test_loading_reports_its_weights_and_leaves_stderr_alone(
    tiny_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    seen: list[tuple[str, int, int]] = []
    load_folder(tiny_folder, resolve_source(str(tiny_folder)), lambda *row: seen.append(row))
    assert seen[0] == ("loading weights", 1, 30)
    assert seen[-1] == ("loading weights", 30, 30)
    load_folder(tiny_folder, resolve_source(str(tiny_folder)))
    assert "it/s" not in capfd.readouterr().err


def test_a_tied_head_is_the_embedding(tiny_writer: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_writer(tmp_path, tie_word_embeddings=True)
    model = load_folder(folder, resolve_source(str(folder)))
    assert isinstance(model.module.lm_head, nn.Linear)
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert "lm_head.weight" not in model.weights.names()
