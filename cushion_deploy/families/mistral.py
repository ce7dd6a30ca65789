"""Mistral: a Llama whose layers may attend to a sliding window only."""

from dataclasses import replace

from cushion_deploy.families.llama import LLAMA

MISTRAL = replace(LLAMA, name="mistral", model_types=("mistral",), windows="all")
