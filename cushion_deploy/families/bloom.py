"""BLOOM: ALiBi, a norm after the embedding, GELU, one linear for q, k and v that orders them head by head."""

from cushion_deploy.families.base import Absorber, Family, SiteRule

BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    layers="transformer.h",
    embedding="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    head="lm_head",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    sites=(
        SiteRule("attn.qkv", ("self_attention.query_key_value",), Absorber("input_layernorm", norm=True)),
        SiteRule("attn.out", ("self_attention.dense",)),
        SiteRule("mlp.up", ("mlp.dense_h_to_4h",), Absorber("post_attention_layernorm", norm=True)),
        SiteRule("mlp.down", ("mlp.dense_4h_to_h",)),
    ),
    activation_key=None,
    activation="gelu_tanh",
    norm_eps_key="layer_norm_epsilon",
    intermediate_key=None,
    norm="layer",
    embedding_norm="transformer.word_embeddings_layernorm",
    positions="alibi",
    qkv="interleaved",
    gated=False,
    attention="eager",
    required={"apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,)},
)
