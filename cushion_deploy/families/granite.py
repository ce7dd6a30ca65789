"""Granite, dense: a Llama with factors of the embedding, of what a block adds, of the scores and of the logits."""

from dataclasses import replace

from cushion_deploy.families.llama import LLAMA

GRANITE = replace(LLAMA, name="granite", model_types=("granite",))
