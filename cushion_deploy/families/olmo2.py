"""OLMo 2: a Llama whose blocks have their norm at the end, and with norms of all queries and of all keys together."""

from dataclasses import replace

from cushion_deploy.families.base import SiteRule
from cushion_deploy.families.llama import LLAMA

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2",),
    attention_norm=None,
    mlp_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    norm_of_all_heads=True,
    sites=(
        # The residual stream itself: nothing before these Sites can absorb a factor.
        SiteRule("attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        LLAMA.rule("attn.out"),
        SiteRule("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj")),
        LLAMA.rule("mlp.down"),
    ),
)
