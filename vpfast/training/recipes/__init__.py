"""How each kind of model is trained and measured: one module a kind, and the table of them."""

from torch import nn

from vpfast.training.recipes import hrvqvae, joint, mspn, prior
from vpfast.training.recipes.recipe import BASELINE, MODEL, Comparison, Loss, Recipe, Sampling, counted, perplexity

RECIPES = {"mspn": mspn.RECIPE, "hrvqvae": hrvqvae.RECIPE, "shrvqvae": prior.RECIPE}
"""By ``model.name``."""

STAGES = {"shrvqvae": {"autoencoder": hrvqvae.RECIPE, "prior": prior.RECIPE, "joint": joint.RECIPE}}
"""By ``model.name`` and ``stage``, in the order of training: the models that are not trained in one go."""


def recipe_named(name: object, stage: str = "all") -> Recipe:
    """The recipe of the model that a configuration calls ``name``, and of a stage of its training.

    Raises:
        ValueError: there is none; names the key.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"model.name: {name!r} given, must be {' or '.join(map(repr, RECIPES))}")
    return RECIPES[name] if stage == "all" else STAGES[name][stage]


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of a model that is there already.

    Raises:
        TypeError: there is none.
    """
    for recipe in RECIPES.values():
        if type(model) is recipe.model_class:
            return recipe
    raise TypeError(f"there is no recipe for a {type(model).__name__}")


__all__ = [
    "BASELINE",
    "MODEL",
    "RECIPES",
    "STAGES",
    "Comparison",
    "Loss",
    "Recipe",
    "Sampling",
    "counted",
    "perplexity",
    "recipe_named",
    "recipe_of",
]
