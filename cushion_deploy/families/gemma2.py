"""Gemma 2: norms before and after each block, (1 + w) norms, scaled embeddings, soft caps, every second layer local."""

from dataclasses import replace

from cushion_deploy.families.base import Absorber, SiteRule
from cushion_deploy.families.llama import LLAMA

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    model_types=("gemma2",),
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
    norm_offset=1.0,
    scaled_embedding=True,
    sites=(
        LLAMA.rule("attn.qkv"),
        LLAMA.rule("attn.out"),
        SiteRule("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj"), Absorber("pre_feedforward_layernorm", norm=True)),
        LLAMA.rule("mlp.down"),
    ),
    activation_key="hidden_activation",
    activation="gelu_tanh",
    # transformers' sdpa ignores the soft cap of attention scores.
    attention="eager",
    rotary_rules=("default", "linear"),
    windows="by_layer",
    needs_bos=True,
    required={"use_bidirectional_attention": (None, False)},
)
