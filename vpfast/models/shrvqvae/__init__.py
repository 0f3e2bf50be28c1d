"""S-HR-VQVAE: hierarchical residual vector quantization of frames. See README.md beside this file."""

from vpfast.models.shrvqvae.codes import Codes, CodesError
from vpfast.models.shrvqvae.config import PRESETS, SHRVQVAEConfig

__all__ = ["PRESETS", "Codes", "CodesError", "SHRVQVAEConfig"]
