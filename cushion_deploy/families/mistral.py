"""Mistral: a llama whose layers may look back no further than a sliding window."""

from dataclasses import replace

from cushion_deploy.families.llama import LLAMA

MISTRAL = replace(LLAMA, name="mistral", model_types=("mistral",), windows="all")
