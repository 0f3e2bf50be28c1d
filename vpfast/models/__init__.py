"""The video prediction networks, and how they are saved and loaded."""

from vpfast.models.mspn import MSPN, MSPNConfig, MSPNOutput
from vpfast.models.storage import load, save

__all__ = ["MSPN", "MSPNConfig", "MSPNOutput", "load", "save"]
