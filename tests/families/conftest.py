"""A tiny random model of every family, made from its real configuration class; each option that matters is on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from cushion_deploy.families import family_for_model_type
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source

WINDOW = 12
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6, 1.8, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 6.0, 8.0, 9.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1, "num_key_value_heads": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW, "attention_bias": True},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.15,
            "logits_scaling": 0.7,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {"initializer_range": 0.3}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": WINDOW, "rope_parameters": LONGROPE, "num_key_value_heads": 4}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2, "tie_word_embeddings": True}),
    "opt-350m": (
        "opt",
        {
            "ffn_dim": 96,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": False,
            "init_std": 0.2,
            "tie_word_embeddings": True,
        },
    ),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4, "tie_word_embeddings": True}),
    "bloom-6-heads": ("bloom", {"n_layer": 2, "n_head": 6, "hidden_size": 96, "tie_word_embeddings": True}),
    "gpt2": (
        "gpt2",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": 256, "tie_word_embeddings": True},
    ),
    "llama with gelu": ("llama", {"hidden_act": "gelu", "attention_bias": True, "mlp_bias": True}),
}
"""What a test calls it: model type and configuration."""

SLIDING = {"sliding_window": WINDOW}
PLANTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", SLIDING),
    "qwen2": ("qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 0}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [0, 1, 0]}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {"initializer_range": 0.08}),
    "gemma2": ("gemma2", {**SLIDING, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**SLIDING, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", SLIDING),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": 256}),
}
"""Models that the sink can be planted into; the layer that it arises in has a window where the family has one."""

LoadVariant = Callable[[str], TorchRunner]


def randomize(module: nn.Module) -> None:
    """Give norms and biases values that show where they are left out."""
    for name, parameter in module.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith(".bias"):
            parameter.add_(torch.randn(parameter.shape) * 0.3)


@pytest.fixture(scope="session")
def variant_folder(tmp_path_factory: pytest.TempPathFactory, tiny_writer: Any) -> Callable[[str], Path]:
    """Return a function from the name of a variant to the folder of its random model; not to be changed."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            model_type, options = VARIANTS[name]
            made[name] = tiny_writer(tmp_path_factory.mktemp(name), randomize, model_type, **options)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def load_variant(variant_folder: Callable[[str], Path]) -> LoadVariant:
    """Return a function from the name of a variant to its random model, loaded."""
    made: dict[str, TorchRunner] = {}

    def load(name: str) -> TorchRunner:
        if name not in made:
            folder = variant_folder(name)
            made[name] = load_folder(folder, resolve_source(str(folder)))
        return made[name]

    return load


@pytest.fixture(scope="session")
def oracle(variant_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    """Return a function from the name of a variant to transformers' own module, as it comes."""
    made: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in made:
            attention = family_for_model_type(VARIANTS[name][0]).attention
            made[name] = AutoModelForCausalLM.from_pretrained(
                variant_folder(name), dtype=torch.float32, attn_implementation=attention
            ).eval()
        return made[name]

    return load


def keeping(config: Any, length: int, kept: int) -> Any:
    """Return what transformers takes as masks of ``length`` tokens of which every token sees the first ``kept``.

    They are additive, ``[1, 1, length, length]``, written out in numpy; None where no layer has a window.
    """
    queries, keys = np.ogrid[:length, :length]
    causal, window = keys <= queries, getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", ["sliding_attention"]))
    if window is None or "sliding_attention" not in kinds:
        return None
    near = causal & ((queries - keys < window) | (keys < kept))
    closed = np.finfo(np.float32).min
    whole, sliding = (
        torch.from_numpy(np.where(seen, 0, closed).astype(np.float32))[None, None] for seen in (causal, near)
    )
    return {"full_attention": whole, "sliding_attention": sliding} if hasattr(config, "layer_types") else sliding


@pytest.fixture(scope="session")
def expected_of(oracle: Callable[[str], Any]) -> Callable[..., np.ndarray]:
    """Return a function to the logits of transformers for one row behind a prefix that stays in sight, without a cache.

    With ``sliding``, windows move past the prefix as they do in transformers.
    """

    def expected(name: str, row: list[int], tokens: tuple[int, ...], *, sliding: bool = False) -> np.ndarray:
        module, ids = oracle(name), torch.tensor([[*tokens, *row]])
        mask = None if sliding or not tokens else keeping(module.config, ids.shape[1], len(tokens))
        with torch.inference_mode():
            out = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return np.asarray(out[0, len(tokens) :].numpy())

    return expected


@pytest.fixture(params=PLANTED, scope="session")
def planted(request: pytest.FixtureRequest, tmp_path_factory: Any, tiny_writer: Any, sink_planter: Any) -> TorchRunner:
    """Return a model of each family with the planted sink."""
    model_type, options = PLANTED[request.param]
    folder = tiny_writer(tmp_path_factory.mktemp("planted"), sink_planter, model_type, **options)
    return load_folder(folder, resolve_source(str(folder)))


@pytest.fixture(scope="session")
def one_sided(plain_ids: Any, plant: Any) -> np.ndarray:
    """Return 48 tokens: 24 of all classes, then, longer than a window, 24 of one class.

    Where nothing absorbs the attention, the first token fires, and so do those with their own class alone in sight.
    """
    one_class = plain_ids[[plant.token_class(int(token)) == 2 for token in plain_ids]]
    return np.concatenate([plain_ids[:24], one_class[:24]])


@pytest.fixture(params=VARIANTS, scope="session")
def variant(request: pytest.FixtureRequest) -> str:
    """Return the name of every variant in turn."""
    return str(request.param)
