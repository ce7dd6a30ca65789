"""The recipe: every setting of a build as one validated, frozen value."""

from cushion_deploy.recipe.recipe import Recipe, Setting
from cushion_deploy.recipe.sections import (
    ROTATIONS,
    Calibration,
    Compute,
    Evaluation,
    Parity,
    Search,
    SmoothQuant,
    Tuning,
)

__all__ = [
    "ROTATIONS",
    "Calibration",
    "Compute",
    "Evaluation",
    "Parity",
    "Recipe",
    "Search",
    "Setting",
    "SmoothQuant",
    "Tuning",
]
