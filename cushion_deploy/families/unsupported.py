"""What well-known architectures have that no family can describe, for the error of someone who has such a model."""

from __future__ import annotations

from collections.abc import Mapping

_EXPERTS = "a router that sends each token to some of many experts"
_LINEAR = (
    "layers with linear attention, whose state is no key/value cache, so that a constant prefix has no place in it"
)
_STATE = "state-space layers, whose state is no key/value cache, so that a constant prefix has no place in it"
_GEMMA4 = "embeddings for every layer, heads of two sizes, and layers that share the keys and values of others"
_LATENT = "keys and values that are compressed together (multi-head latent attention)"

MISSING: Mapping[str, str] = {
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text", "olmoe", "granitemoe", "phimoe"), _EXPERTS
    ),
    **dict.fromkeys(("gpt_oss",), f"{_EXPERTS}, and learned sinks in the softmax of attention"),
    **dict.fromkeys(("llama4", "llama4_text", "dots1", "glm4_moe", "minimax_m2", "ernie4_5_moe"), _EXPERTS),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2"), f"{_EXPERTS}, and {_LATENT}"),
    **dict.fromkeys(("minicpm3",), _LATENT),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), _LINEAR),
    **dict.fromkeys(("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text"), f"{_EXPERTS}, and {_LINEAR}"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "falcon_h1", "jamba", "bamba", "nemotron_h"), _STATE),
    **dict.fromkeys(("granitemoehybrid", "zamba2"), _STATE),
    **dict.fromkeys(("recurrent_gemma", "rwkv", "lfm2"), "recurrent layers, which have no key/value cache"),
    **dict.fromkeys(("gemma4", "gemma4_text", "gemma3n", "gemma3n_text"), _GEMMA4),
    **dict.fromkeys(("mllama", "mllama_text_model"), "layers that attend to an image"),
}
"""Model type to what it has."""


def missing_features(model_type: str | None) -> str:
    """Return ``: it has ...`` for the message of an error; empty if nothing is known about the model type."""
    found = MISSING.get(model_type or "")
    return f": it has {found}, which cushion-deploy cannot express" if found else ""
