"""SmolLM3: a Llama in which some layers, usually every fourth, have no rotary positions (NoPE)."""

from dataclasses import replace

from cushion_deploy.families.llama import LLAMA

SMOLLM3 = replace(LLAMA, name="smollm3", model_types=("smollm3",), windows="by_layer")
