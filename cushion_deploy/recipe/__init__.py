"""The recipe: every setting of a build as one validated, frozen value."""

from cushion_deploy.recipe.recipe import Recipe, Setting
from cushion_deploy.recipe.sections import Evaluation, Search, Tuning

__all__ = ["Evaluation", "Recipe", "Search", "Setting", "Tuning"]
