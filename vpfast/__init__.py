"""vpfast: fast video prediction in PyTorch. Operators in ``ops``, drop-in modules in ``nn``, networks in ``models``."""

from vpfast import models, nn, ops
from vpfast._version import __version__
from vpfast.ops import backend, current_backend
from vpfast.stream import Stream

__all__ = ["Stream", "__version__", "backend", "current_backend", "models", "nn", "ops"]
