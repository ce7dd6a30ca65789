"""A transformers configuration as a ModelSpec: sizes, windows, rotary scaling, factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from cushion_deploy.core.model_spec import ModelSpec, RotaryScaling
from cushion_deploy.errors import UsageError
from cushion_deploy.families import ACTIVATIONS, Family
from cushion_deploy.modeling.source import ModelSource

UNLIMITED_POSITIONS = 131_072
"""Context of a model without a limit of its own (ALiBi); memory runs out far below."""
TORCH_NORM_EPS = 1e-5
_YARN = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (*_YARN, "original_max_position_embeddings"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}
"""Parameters of each rotary rule. Checkpoints have other keys too, such as ``type``, the old name of the rule."""


def describe(module: Any, family: Family, source: ModelSource) -> ModelSpec:
    """Return the ModelSpec of a loaded module."""
    c = module.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    rotary, local = _rotary(c, family)
    activation = _named(c, family.activation_key)
    # The generation config of a chat model also has the end of a turn; config.json may have only the end of a text.
    eos = getattr(module.generation_config, "eos_token_id", None)
    eos = c.eos_token_id if eos is None else eos
    embedding = getattr(c, "word_embed_proj_dim", c.hidden_size)
    scalar = getattr(c, "query_pre_attn_scalar", None) or head_dim
    rotated = getattr(c, "no_rope_layers", None) or []
    return ModelSpec(
        family=family.name,
        source=Path(source.label).name if source.kind == "gguf" else source.label,
        weights_digest=source.digest,
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=_named(c, family.intermediate_key) or 4 * c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        head_dim=head_dim,
        max_positions=_positions(c, rotary),
        norm_eps=_named(c, family.norm_eps_key) or TORCH_NORM_EPS,
        activation=ACTIVATIONS[activation] if activation else family.activation,
        rotary=rotary,
        tied_head=bool(c.tie_word_embeddings),
        parameters=sum(p.numel() for p in module.parameters()),
        bos_token_id=c.bos_token_id,
        eos_token_ids=tuple(eos if isinstance(eos, list) else [] if eos is None else [eos]),
        attention_scale=getattr(c, "attention_multiplier", None) or scalar**-0.5,
        revision=source.revision,
        local_rotary=local,
        windows=_windows(c, family),
        norm_first=bool(getattr(c, "do_layer_norm_before", True)),
        score_cap=getattr(c, "attn_logit_softcapping", None) or 0.0,
        logit_cap=getattr(c, "final_logit_softcapping", None) or 0.0,
        embedding_size=embedding if embedding != c.hidden_size else 0,
        unrotated=tuple(i for i, whether in enumerate(rotated) if not whether),
        embedding_factor=getattr(c, "embedding_multiplier", 1.0),
        residual_factor=getattr(c, "residual_multiplier", 1.0),
        logit_divisor=getattr(c, "logits_scaling", 1.0),
    )


def _positions(config: Any, rotary: RotaryScaling | None) -> int:
    """Return the number of positions in a context.

    ``longrope`` rotates all keys, also those in the cache, by other angles once a context is longer than the original
    one. That is impossible with keys cached after rotation and with a constant prefix, so the context ends there.
    """
    limit = getattr(config, "max_position_embeddings", None) or UNLIMITED_POSITIONS
    if rotary and rotary.rule == "longrope" and rotary.parameters["short_factor"] != rotary.parameters["long_factor"]:
        return min(int(limit), int(cast(float, rotary.parameters["original_max_position_embeddings"])))
    return int(limit)


def _named(config: Any, key: str | None) -> Any:
    return getattr(config, key) if key else None


def _windows(config: Any, family: Family) -> tuple[int, ...]:
    """Return the attention window of each layer, 0 for none; empty if no layer has one."""
    window = 0 if family.windows == "none" else getattr(config, "sliding_window", None) or 0
    kinds = config.layer_types if family.windows == "by_layer" else ["sliding_attention"] * config.num_hidden_layers
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _rotary(config: Any, family: Family) -> tuple[RotaryScaling | None, RotaryScaling | None]:
    """Return the rotary parameters of the model, and those of its local layers if they differ."""
    if family.positions != "rotary":
        return None, None
    rope = config.rope_parameters
    if "full_attention" not in rope:
        return _scaling(rope, config, family), None
    # A config may have parameters for local layers that the model does not have.
    local = rope.get("sliding_attention") if "sliding_attention" in config.layer_types else None
    return _scaling(rope["full_attention"], config, family), _scaling(local, config, family) if local else None


def _scaling(given: dict[str, Any], config: Any, family: Family) -> RotaryScaling:
    rope = {key: value for key, value in given.items() if value is not None}
    rule = str(rope.pop("rope_type", "default"))
    if rule not in family.rotary_rules:
        raise UsageError(
            f"rotary scaling rule '{rule}' is not supported for family {family.name}",
            hint=f"supported: {', '.join(family.rotary_rules)}",
        )
    partial = float(rope.get("partial_rotary_factor", 1.0)) if family.partial_rotary else 1.0
    if rule in ("yarn", "longrope"):
        rope.setdefault("factor", config.max_position_embeddings / rope["original_max_position_embeddings"])
    read = {key: rope[key] for key in PARAMETERS[rule] if key in rope}
    parameters = {k: tuple(map(float, v)) if isinstance(v, list) else float(v) for k, v in sorted(read.items())}
    return RotaryScaling(float(rope["rope_theta"]), rule, parameters, partial)
