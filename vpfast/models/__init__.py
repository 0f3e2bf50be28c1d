"""The video prediction networks, and functions to save and load them."""

from vpfast.models.graphed_step import GraphedStep
from vpfast.models.mspn import MSPN, MSPNConfig, MSPNOutput
from vpfast.models.predictor import Predictor
from vpfast.models.shrvqvae import HRVQVAE, SHRVQVAE, Codes, SHRVQVAEConfig, STPixelCNN
from vpfast.models.storage import load, pretrained, save

__all__ = [
    "HRVQVAE",
    "MSPN",
    "SHRVQVAE",
    "Codes",
    "GraphedStep",
    "MSPNConfig",
    "MSPNOutput",
    "Predictor",
    "SHRVQVAEConfig",
    "STPixelCNN",
    "load",
    "pretrained",
    "save",
]
