"""vpfast: fast video prediction in PyTorch. Operators in ``ops``, drop-in modules in ``nn``, networks in ``models``.

Importing ``vpfast`` or ``vpfast.ops`` registers the operators and loads nothing more: that is all that a program
exported from a model needs. Everything else is imported when it is first asked for.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from vpfast import _torch as _torch  # says what is missing before anything else misses it
from vpfast import ops
from vpfast._version import __version__
from vpfast.ops import backend, current_backend

if _TYPE_CHECKING:
    from vpfast import models, nn
    from vpfast._optimize import optimize
    from vpfast.stream import Stream

__all__ = ["Stream", "__version__", "backend", "current_backend", "models", "nn", "ops", "optimize"]

_FROM = {"Stream": "vpfast.stream", "optimize": "vpfast._optimize"}


def __getattr__(name: str) -> object:
    if name in ("models", "nn"):
        return _import_module(f"vpfast.{name}")
    if name in _FROM:
        return getattr(_import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
