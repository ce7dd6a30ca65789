"""Model families: one file of data each, one line in the table below."""

from __future__ import annotations

from cushion_deploy.errors import UsageError
from cushion_deploy.families.base import Family, SiteRule
from cushion_deploy.families.llama import LLAMA

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA,)}

__all__ = ["FAMILIES", "Family", "SiteRule", "family_for_model_type", "get_family"]


def get_family(name: str) -> Family:
    """Return a family by its own name."""
    return FAMILIES[name]


def family_for_model_type(model_type: str | None) -> Family:
    """Return the family that covers a ``model_type`` of config.json.

    Raises:
        UsageError: nothing covers it; the hint lists what is supported.
    """
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    supported = sorted(t for f in FAMILIES.values() for t in f.model_types)
    raise UsageError(
        f"model type '{model_type}' is not supported",
        hint=f"supported model types: {', '.join(supported)}. To add one, copy "
        "cushion_deploy/families/llama.py and describe the new family in it",
    )
