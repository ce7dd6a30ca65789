"""Tensors of a checkpoint that a model does not use: each is known to change nothing, or is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from cushion_deploy.errors import UsageError

_PART = r"(^|\.)"
_TOWERS = (
    *(
        "vision_tower",
        "vision_model",
        "visual",
        "vision_encoder",
        "vision_embed_tokens",
        "image_newline",
        "embed_vision",
    ),
    *("multi_modal_projector", "mm_projector", "connector", "patch_merger", "audio_tower", "embed_audio"),
)


@dataclass(frozen=True)
class Harmless:
    """A kind of tensor that does not change what a decoder computes.

    Attributes:
        names: pattern of the names.
        reason: what the tensors are, to complete 'left out: ...'.
        notable: whether a user should hear of it: what is left out is something that the checkpoint could do.
    """

    names: re.Pattern[str]
    reason: str
    notable: bool = False


HARMLESS = (
    Harmless(
        re.compile(_PART + r"rotary_emb\.(\w+_)?(inv_freq|cos_cached|sin_cached)$"), "rotary tables, computed again"
    ),
    Harmless(re.compile(r"\.attn\.(bias|masked_bias)$"), "causal masks of attention, computed again"),
    Harmless(re.compile(_PART + r"position_ids$"), "numbers of positions, computed again"),
    Harmless(
        re.compile(
            r"\.(k_scale|v_scale|q_scale|input_scale|input_zero_point|output_scale|input_scale_ub|activation_scale)$"
        ),
        "scales of activations and of the cache, measured again by calibration",
    ),
    Harmless(re.compile(_PART + rf"({'|'.join(_TOWERS)})(\.|$)"), "the part that reads images or sound", True),
    Harmless(re.compile(_PART + r"mtp(_\w+)?\."), "layers that predict several tokens at once", True),
    Harmless(re.compile(_PART + r"(v_head|value_head)\."), "the value head of reinforcement learning", True),
)
"""What may be left out, and why."""
_REFUSED = (
    (re.compile(r"lora_|\.base_layer\."), "belongs to an adapter (LoRA)", "merge the adapter into the weights first"),
    (
        re.compile(
            r"\.(qweight|qzeros|g_idx|scales|weight_packed|weight_shape|SCB|absmax|quant_map|\w*quant_state\S*)$"
        ),
        "belongs to a quantization that is not read (GPTQ, AWQ, bitsandbytes or packed codes)",
        "give the floating-point checkpoint that it was made from",
    ),
    (
        re.compile(r"_(blocks|scales)$"),
        "belongs to a quantization that is not read (MXFP4)",
        "give the floating-point checkpoint that it was made from",
    ),
    (
        re.compile(r"\.bias$"),
        "is a bias that config.json does not ask for",
        "set attention_bias (mlp_bias) to true in config.json if the model has biases",
    ),
)
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


def harmless_kinds(
    unused: Collection[str], is_zero: Callable[[str], bool], layers: int, extra: int
) -> dict[Harmless, int]:
    """Return the kinds of tensors that are left out, with their numbers.

    Args:
        unused: names of the tensors that the module does not have, and that no weight is dequantized with.
        is_zero: whether a tensor contains nothing but zeros.
        layers: layers of the model.
        extra: layers behind them that predict further tokens, as the configuration says.

    Raises:
        UsageError: a tensor is not known to be harmless; the first one is named.
    """
    zero = Harmless(re.compile(r"\.bias$"), "biases that are all zero")
    further = Harmless(_LAYER, "layers that predict several tokens at once", True)
    found: dict[Harmless, int] = {}
    for name in sorted(unused):
        kind = next((kind for kind in HARMLESS if kind.names.search(name)), None)
        layer = _LAYER.search(name)
        if kind is None and layer and layers <= int(layer[1]) < layers + extra:
            kind = further
        if kind is None and zero.names.search(name) and is_zero(name):
            kind = zero
        if kind is None:
            raise _refusal(name, layers, layer)
        found[kind] = found.get(kind, 0) + 1
    return found


def _refusal(name: str, layers: int, layer: re.Match[str] | None) -> UsageError:
    if layer and int(layer[1]) >= layers:
        return UsageError(
            f"the checkpoint has {name}, and config.json asks for {layers} layers",
            hint="correct num_hidden_layers in config.json, or fetch config.json and weights of the same model",
        )
    for names, reason, hint in _REFUSED:
        if names.search(name):
            return UsageError(f"the checkpoint has {name}, which {reason}", hint=hint)
    return UsageError(
        f"the checkpoint has {name}, which this config.json does not use; without it the model may be another one",
        hint="fetch config.json and weights of the same model; remove the tensor from the file if it has no effect",
    )
