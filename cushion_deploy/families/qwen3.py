"""Qwen3: a Llama with norms of each head's query and key, and an independent head size."""

from dataclasses import replace

from cushion_deploy.families.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    model_types=("qwen3",),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    windows="by_layer",
)
