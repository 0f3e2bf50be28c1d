"""Training, from a configuration to weights, and evaluation. Needs ``pip install 'vpfast[cli]'``."""

from vpfast.training.checkpoint import read_weights
from vpfast.training.clips import dataset
from vpfast.training.config import AdversarialConfig, DataConfig, LossConfig, OptimConfig, SplitConfig, TrainConfig
from vpfast.training.engine import Stopped
from vpfast.training.evaluation import Evaluation, evaluate
from vpfast.training.recipes import Sampling
from vpfast.training.stages import train

__all__ = [
    "AdversarialConfig",
    "DataConfig",
    "Evaluation",
    "LossConfig",
    "OptimConfig",
    "Sampling",
    "SplitConfig",
    "Stopped",
    "TrainConfig",
    "dataset",
    "evaluate",
    "read_weights",
    "train",
]
