"""Llama: RMS norms, rotary positions, grouped-query attention, gated SiLU MLP. Also SmolLM and SmolLM2."""

from cushion_deploy.families.base import Absorber, Family, SiteRule

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
        SiteRule(
            "attn.qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            Absorber("input_layernorm", norm=True),
        ),
        SiteRule("attn.out", ("self_attn.o_proj",)),
        SiteRule("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj"), Absorber("post_attention_layernorm", norm=True)),
        SiteRule("mlp.down", ("mlp.down_proj",), Absorber("mlp.up_proj")),
    ),
    rotary_rules=("default", "linear", "llama3", "yarn"),
)
