"""Refuse lengths of text that do not fit into the model's positions behind the prefix."""

from __future__ import annotations

from collections.abc import Collection

from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.errors import UsageError
from cushion_deploy.recipe import Recipe

SECTIONS = ("search", "tuning", "calibration", "evaluation", "parity")


def longest_prefix(recipe: Recipe) -> int:
    """Return the most positions that the prefix of a build may take."""
    return recipe.search.max_length if recipe.search.enabled and recipe.export.prefix != "none" else 0


def require_positions(recipe: Recipe, spec: ModelSpec, prefix: int, sections: Collection[str] = SECTIONS) -> None:
    """Check that the texts of some sections fit behind a prefix of ``prefix`` positions.

    Raises:
        UsageError: one does not; the message names the setting.
    """
    needed = {
        "search.text_tokens": recipe.search.text_tokens if longest_prefix(recipe) else 0,
        "tuning.window": recipe.tuning.window if recipe.tuning.enabled else 0,
        "calibration.window": recipe.calibration.window,
        "evaluation.window": recipe.evaluation.window,
        "parity.tokens + parity.decode_tokens": recipe.parity.tokens + recipe.parity.decode_tokens,
    }
    room = spec.max_positions - prefix
    for name, tokens in needed.items():
        if name.partition(".")[0] in sections and tokens > room:
            raise UsageError(
                f"{name} is {tokens}, but a prefix of up to {prefix} leaves {room} of the model's "
                f"{spec.max_positions} positions",
                hint=f"set {name} to at most {room}" + (", or search.max_length lower" if prefix else ""),
            )
