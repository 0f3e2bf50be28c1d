"""S-HR-VQVAE: hierarchical residual vector quantization of frames. See README.md beside this file."""

from vpfast.models.shrvqvae.codes import Codes, CodesError
from vpfast.models.shrvqvae.config import PRESETS, SHRVQVAEConfig
from vpfast.models.shrvqvae.hrvqvae import HRVQVAE, HRVQVAEOutput, hrvqvae_loss
from vpfast.models.shrvqvae.st_pixelcnn import STPixelCNN

__all__ = [
    "HRVQVAE",
    "PRESETS",
    "Codes",
    "CodesError",
    "HRVQVAEOutput",
    "SHRVQVAEConfig",
    "STPixelCNN",
    "hrvqvae_loss",
]
