"""OPT: learned positions, layer norms before or (350m) after each block, biases, ReLU; 350m projects its embedding."""

from cushion_deploy.families.base import Absorber, Family, SiteRule

OPT = Family(
    name="opt",
    model_types=("opt",),
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    sites=(
        SiteRule(
            "attn.qkv",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            Absorber("self_attn_layer_norm", norm=True),
        ),
        SiteRule("attn.out", ("self_attn.out_proj",)),
        SiteRule("mlp.up", ("fc1",), Absorber("final_layer_norm", norm=True)),
        # relu(x / s) = relu(x) / s for s > 0.
        SiteRule("mlp.down", ("fc2",), Absorber("fc1")),
    ),
    activation_key="activation_function",
    activation="relu",
    norm_eps_key=None,
    intermediate_key="ffn_dim",
    norm="layer",
    embedding_in="model.decoder.project_in",
    embedding_out="model.decoder.project_out",
    positions="learned",
    position_embedding="model.decoder.embed_positions",
    position_offset=2,
    gated=False,
    required={"activation_function": ("relu",), "layer_norm_elementwise_affine": (True,)},
)
