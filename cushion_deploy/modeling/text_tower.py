"""The decoder inside a checkpoint of several modalities: its configuration, as that of a text model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXT_TYPES: Mapping[str, str] = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_text": "qwen3",
}
"""Model types whose decoder is, for text, another model: all three of their rotary positions are those of the text."""
_IMAGE_ROTATION = ("mrope_section", "mrope_interleaved")


def has_towers(config: Mapping[str, Any]) -> bool:
    """Return whether a config.json describes more than a decoder."""
    return isinstance(config.get("text_config"), Mapping) or config.get("model_type") in TEXT_TYPES


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the decoder, with the model type of the text model."""
    nested = config.get("text_config")
    found = dict(nested if isinstance(nested, Mapping) else config)
    given = found.get("model_type")
    return {**found, "model_type": TEXT_TYPES.get(given, given) if isinstance(given, str) else given}


def decoder_config(config: Any) -> Any:
    """Return the transformers configuration of the decoder in that of a whole model, which may be it already.

    What belongs to the whole is carried over: whether the head is tied.
    """
    from transformers import CONFIG_MAPPING

    text = config.get_text_config(decoder=True)
    wanted = TEXT_TYPES.get(text.model_type)
    if wanted:
        fields = {key: value for key, value in text.to_dict().items() if key != "model_type"}
        rope = {key: value for key, value in fields["rope_parameters"].items() if key not in _IMAGE_ROTATION}
        text = CONFIG_MAPPING[wanted](**{**fields, "rope_parameters": rope})
    if text is not config:
        text.tie_word_embeddings = config.tie_word_embeddings
    return text
