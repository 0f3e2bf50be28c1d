"""MSPN: multi-scale predictive coding with encoder-decoder LSTM. See README.md beside this file."""

from vpfast.models.mspn.config import PRESETS, MSPNConfig
from vpfast.models.mspn.discriminator import Discriminator
from vpfast.models.mspn.loss import pixel_loss
from vpfast.models.mspn.network import MSPN, MSPNOutput, MSPNState

__all__ = ["MSPN", "PRESETS", "Discriminator", "MSPNConfig", "MSPNOutput", "MSPNState", "pixel_loss"]
