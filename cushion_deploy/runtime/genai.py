"""genai_config.json, by which onnxruntime-genai runs the graph of a bundle; it does not need to know the prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.engines.onnxruntime.kernels import SESSION_CONFIG, UINT8_WEIGHTS

GENAI_NAME = "genai_config.json"
EVERYWHERE = {**SESSION_CONFIG, UINT8_WEIGHTS: "1"}
"""Session config of a runtime that does not try its kernels: exact on every processor, and on those with VNNI or AMX
slower than the value 0, which is exact there as well."""
DECODER = "llama"
"""Its name for a plain decoder with a cache, which every exported graph is, whatever the model family."""


def genai_config(
    contract: GraphContract, config: Mapping[str, Any], eos_token_ids: Sequence[int], *, heads: int, hidden_size: int
) -> dict[str, Any]:
    """Return genai_config.json of a graph.

    Args:
        contract: contract of the graph; the context is its positions less those of the prefix.
        config: config.json of the model, for its special tokens.
        eos_token_ids: tokens that end a generation.
        heads, hidden_size: number of attention heads and hidden size of the model.
    """
    context = contract.max_positions - contract.prefix_length
    ends = list(eos_token_ids)
    pad = config.get("pad_token_id")
    if not isinstance(pad, int):
        pad = ends[0] if ends else 0
    bos = config.get("bos_token_id")
    return {
        "model": {
            "type": DECODER,
            "bos_token_id": bos if isinstance(bos, int) else pad,
            "eos_token_id": ends if len(ends) != 1 else ends[0],
            "pad_token_id": pad,
            "context_length": context,
            "vocab_size": contract.vocab_size,
            "decoder": {
                "filename": "model.onnx",
                "head_size": contract.head_dim,
                "hidden_size": hidden_size,
                "num_attention_heads": heads,
                "num_hidden_layers": contract.num_layers,
                "num_key_value_heads": contract.num_kv_heads,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": [], **EVERYWHERE},
                "inputs": {
                    **{name: name for name in ("input_ids", "attention_mask", "position_ids")},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # The cache grows by concatenation: past and present are separate buffers.
        "search": {"do_sample": False, "max_length": context, "past_present_share_buffer": False, "num_beams": 1},
    }
