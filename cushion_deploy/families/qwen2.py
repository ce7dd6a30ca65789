"""Qwen2 and Qwen2.5: a Llama with biases on q, k and v; upper layers may use a sliding window."""

from dataclasses import replace

from cushion_deploy.families.llama import LLAMA

QWEN2 = replace(LLAMA, name="qwen2", model_types=("qwen2",), windows="by_layer")
