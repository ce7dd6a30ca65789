"""Gemma 3, text: a Gemma 2 with norms of query and key, two rotary bases, and five local layers per global layer."""

from dataclasses import replace

from cushion_deploy.families.gemma2 import GEMMA2

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types=("gemma3_text",),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    attention="sdpa",
    required={**GEMMA2.required, "attn_logit_softcapping": (None,)},
)
