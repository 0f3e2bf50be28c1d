"""How each kind of model is trained and measured: one module a kind, and the table of them."""

from torch import nn

from vpfast.training.recipes import hrvqvae, mspn
from vpfast.training.recipes.recipe import Comparison, Loss, Recipe, counted, perplexity

RECIPES = {"mspn": mspn.RECIPE, "hrvqvae": hrvqvae.RECIPE}
"""By ``model.name``."""


def recipe_named(name: object) -> Recipe:
    """The recipe of the model that a configuration calls ``name``.

    Raises:
        ValueError: there is none; names the key.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"model.name: {name!r} given, must be {' or '.join(map(repr, RECIPES))}")
    return RECIPES[name]


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of a model that is there already.

    Raises:
        TypeError: there is none.
    """
    for recipe in RECIPES.values():
        if type(model) is recipe.model_class:
            return recipe
    raise TypeError(f"there is no recipe for a {type(model).__name__}")


__all__ = ["RECIPES", "Comparison", "Loss", "Recipe", "counted", "perplexity", "recipe_named", "recipe_of"]
