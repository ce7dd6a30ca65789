"""Phi-3 and Phi-4-mini: a Llama with one linear for q, k and v, and one for gate and up."""

from dataclasses import replace

from cushion_deploy.families.base import Absorber, SiteRule
from cushion_deploy.families.llama import LLAMA

PHI3 = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    sites=(
        SiteRule("attn.qkv", ("self_attn.qkv_proj",), Absorber("input_layernorm", norm=True)),
        LLAMA.rule("attn.out"),
        SiteRule("mlp.gate_up", ("mlp.gate_up_proj",), Absorber("post_attention_layernorm", norm=True)),
        SiteRule("mlp.down", ("mlp.down_proj",), Absorber("mlp.gate_up_proj", part=(1, 2))),
    ),
    rotary_rules=("default", "longrope"),
    partial_rotary=True,
    windows="all",
)
