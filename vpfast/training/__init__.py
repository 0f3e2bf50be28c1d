"""Training: a run from its configuration to its weights. Needs ``pip install 'vpfast[cli]'``."""

from vpfast.training.config import AdversarialConfig, DataConfig, LossConfig, OptimConfig, SplitConfig, TrainConfig
from vpfast.training.engine import Stopped
from vpfast.training.stages import train

__all__ = [
    "AdversarialConfig",
    "DataConfig",
    "LossConfig",
    "OptimConfig",
    "SplitConfig",
    "Stopped",
    "TrainConfig",
    "train",
]
