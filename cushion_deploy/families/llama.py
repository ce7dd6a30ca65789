"""Llama: RMS norms, rotary positions, grouped-query attention, gated SiLU MLP. Also SmolLM and SmolLM2."""

from cushion_deploy.families.base import Family, SiteRule

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    layers="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    sites=(
        SiteRule("attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
        SiteRule("attn.out", ("self_attn.o_proj",)),
        SiteRule("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
        SiteRule("mlp.down", ("mlp.down_proj",), "mlp.up_proj"),
    ),
    activations=("silu",),
    rotary_rules=("default", "linear", "llama3"),
)
