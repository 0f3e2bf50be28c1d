"""Whether modules are still what they were made as: what does their work another way asks before it does."""

import copy
from itertools import zip_longest
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

Model = TypeVar("Model", bound=nn.Module)

_REWRITE = (BasePruningMethod, WeightNorm, SpectralNorm)
"""torch's hooks that make a weight of other parameters whenever its module is called."""


def is_intercepted(model: nn.Module) -> bool:
    """Does anybody look at what this module, a part of it, or every module is given or gives, or do its work instead?

    By hooks, or by a ``forward`` that was set on one module, as accelerate sets it.
    """
    everywhere = nn.modules.module
    return bool(
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
        or _is_watched(model)
    )


def _is_watched(model: nn.Module) -> bool:
    if _has_hooks(model) or "forward" in model.__dict__:
        return True
    return any(part is not None and _is_watched(part) for part in model._modules.values())


def _has_hooks(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)


def renew_weights(model: nn.Module) -> None:
    """Have pruning, weight_norm and spectral_norm, where they are hooks, make weights of the parameters of now.

    They do so when their module is called, which who reads a weight by itself does not.
    """
    for part in model.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, _REWRITE):
                hook(part, ())


def plain_copy(model: Model) -> Model:
    """A copy in evaluation mode, without gradients, whose weights are parameters and nothing more.

    What made them of others, parametrizations or hooks of torch's, is worked in.
    """
    # deepcopy refuses what a hook has computed with gradients.
    computed = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    copied = copy.deepcopy(model, {id(value): value.detach().clone() for value in computed}).eval()
    for part in list(copied.modules()):
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, _REWRITE):
                hook.remove(part)
                del part._forward_pre_hooks[key]
        if parametrize.is_parametrized(part):
            _end_parametrizations(part)
    return copied.requires_grad_(False)


def _end_parametrizations(part: nn.Module) -> None:
    """As torch's ``remove_parametrizations``, which takes properties from a class that copies share."""
    values = {name: getattr(part, name).detach() for name in part.parametrizations}  # type: ignore[union-attr]
    del part.parametrizations
    part.__class__ = type(part).__bases__[0]
    for name, value in values.items():
        part.register_parameter(name, nn.Parameter(value.clone()))


def is_as_made(model: nn.Module, made: nn.Module) -> bool:
    """Has ``model`` the layers of ``made``, to the last option, and does nobody intercept what they do?"""
    return _options(model) == _options(made) and not is_intercepted(model)


def check_as_made(owner: str, model: nn.Module, made: nn.Module) -> None:
    """Raise TypeError unless ``model`` has the layers of ``made`` and each does what its class says.

    Batch norms may be synchronized ones, and weights parametrized. Hooks are left alone.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    named = ((name, part) for name, part in model.named_modules() if ".parametrizations" not in f".{name}")
    for own, found in zip_longest(made.named_modules(), named):
        if own is None or found is None or own[0] != found[0] or (own[0] and _kind(own[1]) != _kind(found[1])):
            name, part = found or own
            instead = f" in place of {_in_words(own[1])}" if own is not None and own[0] == name else ""
            what = f"{name!r} is {_in_words(part)}{instead}" if found else f"{name!r} is missing"
            raise TypeError(f"{owner} reads the layers that {type(made).__name__} is made of: {what}")
        if "forward" in vars(found[1]):
            raise TypeError(
                f"{owner} does not call the `forward` that was set on {found[0]!r}, {_in_words(found[1])}; remove it"
            )


def check_without_hooks(owner: str, model: nn.Module) -> None:
    """Raise TypeError where a hook would not be called."""
    for name, part in model.named_modules():
        if _has_hooks(part):
            raise TypeError(f"{owner} does not call hooks, and {name or 'the model'!r} has some; remove them before")


def _options(model: nn.Module) -> list[tuple[str, type, str]]:
    return [(name, type(part), part.extra_repr()) for name, part in model.named_modules()]


def _kind(part: nn.Module) -> tuple[type, str]:
    """The class, and what else decides what a module computes beside its weights."""
    if isinstance(part, _BatchNorm):
        return nn.BatchNorm2d, str(part.track_running_stats)
    kind = type(part).__bases__[0] if parametrize.is_parametrized(part) else type(part)
    activation = isinstance(part, nn.LeakyReLU)
    return kind, str(part.negative_slope) if activation else ""


def _in_words(part: nn.Module) -> str:
    return f"{type(part).__name__}({part.extra_repr()})"
