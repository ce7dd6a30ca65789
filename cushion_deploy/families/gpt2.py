"""GPT-2: learned positions, layer norms, GELU; linears stored transposed, with q, k and v in one."""

from cushion_deploy.families.base import Absorber, Family, SiteRule

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    layers="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    head="lm_head",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    sites=(
        SiteRule("attn.qkv", ("attn.c_attn",), Absorber("ln_1", norm=True)),
        SiteRule("attn.out", ("attn.c_proj",)),
        SiteRule("mlp.up", ("mlp.c_fc",), Absorber("ln_2", norm=True)),
        SiteRule("mlp.down", ("mlp.c_proj",)),
    ),
    activation_key="activation_function",
    activation="gelu_tanh",
    norm_eps_key="layer_norm_epsilon",
    intermediate_key="n_inner",
    norm="layer",
    positions="learned",
    position_embedding="transformer.wpe",
    gated=False,
    transposed=("c_attn", "c_proj", "c_fc"),
    required={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
)
