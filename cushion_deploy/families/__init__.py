"""Model families: one data file per family, and the table that lists them."""

from __future__ import annotations

from cushion_deploy.errors import UsageError
from cushion_deploy.families.base import ACTIVATIONS, Absorber, Activation, Family, SiteRule
from cushion_deploy.families.bloom import BLOOM
from cushion_deploy.families.gemma2 import GEMMA2
from cushion_deploy.families.gemma3 import GEMMA3
from cushion_deploy.families.gpt2 import GPT2
from cushion_deploy.families.granite import GRANITE
from cushion_deploy.families.llama import LLAMA
from cushion_deploy.families.mistral import MISTRAL
from cushion_deploy.families.olmo2 import OLMO2
from cushion_deploy.families.opt import OPT
from cushion_deploy.families.phi3 import PHI3
from cushion_deploy.families.qwen2 import QWEN2
from cushion_deploy.families.qwen3 import QWEN3
from cushion_deploy.families.smollm3 import SMOLLM3
from cushion_deploy.families.unsupported import missing_features

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LLAMA, SMOLLM3, MISTRAL, QWEN2, QWEN3, GRANITE, OLMO2, GEMMA2, GEMMA3, PHI3, OPT, BLOOM, GPT2)
}

__all__ = [
    "ACTIVATIONS",
    "FAMILIES",
    "Absorber",
    "Activation",
    "Family",
    "SiteRule",
    "family_for_model_type",
    "get_family",
]


def get_family(name: str) -> Family:
    """Return a family by its name."""
    return FAMILIES[name]


def family_for_model_type(model_type: str | None) -> Family:
    """Return the family that covers a ``model_type`` of config.json.

    Raises:
        UsageError: no family covers it; the message says what is missing if that is known, and the hint lists what is
            supported.
    """
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    supported = sorted(t for f in FAMILIES.values() for t in f.model_types)
    raise UsageError(
        f"model type '{model_type}' is not supported{missing_features(model_type)}",
        hint=f"supported model types: {', '.join(supported)}. To add one, copy "
        "cushion_deploy/families/llama.py and describe the new family in it",
    )
