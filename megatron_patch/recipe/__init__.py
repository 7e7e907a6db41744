"""The typed recipe, the one place where a setting of a run is written.

`load` reads `recipes/NAME.yaml`, or `NAME` from where the package has its recipes, follows `extends`, applies named
alternatives (`use=NAME`) and `key.path=value` overrides, and returns a validated, frozen `Recipe`.
"""

from megatron_patch.recipe.reader import RECIPES, RecipeError, find, from_text, load
from megatron_patch.recipe.section import Section
from megatron_patch.recipe.settings import (
    Batch,
    Checkpoint,
    Data,
    Model,
    Optimizer,
    Parallel,
    Recipe,
    Run,
    Watchdog,
)
from megatron_patch.recipe.vision import Vision

__all__ = [
    "RECIPES",
    "Batch",
    "Checkpoint",
    "Data",
    "Model",
    "Optimizer",
    "Parallel",
    "Recipe",
    "RecipeError",
    "Run",
    "Section",
    "Vision",
    "Watchdog",
    "find",
    "from_text",
    "load",
]
