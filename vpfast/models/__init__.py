"""The video prediction networks, and how they are saved and loaded."""

from vpfast.models.mspn import MSPN, MSPNConfig, MSPNOutput
from vpfast.models.shrvqvae import HRVQVAE, Codes, SHRVQVAEConfig, STPixelCNN
from vpfast.models.storage import load, save

__all__ = ["HRVQVAE", "MSPN", "Codes", "MSPNConfig", "MSPNOutput", "SHRVQVAEConfig", "STPixelCNN", "load", "save"]
