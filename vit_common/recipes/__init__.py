"""Recipes: the settings of a training run under one name each, with their source.

recipe.py has the settings, their checks and the published recipes; schedule.py the learning rate
that they say for each step.
"""

from vit_common.recipes.recipe import (
    ALIASES,
    RECIPES,
    SHORT_NAMES,
    Recipe,
    parse_settings,
    recipe,
)
from vit_common.recipes.schedule import learning_rates, peak_learning_rate

__all__ = [
    "ALIASES",
    "RECIPES",
    "SHORT_NAMES",
    "Recipe",
    "learning_rates",
    "parse_settings",
    "peak_learning_rate",
    "recipe",
]
