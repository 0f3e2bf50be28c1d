"""S-HR-VQVAE: frames as hierarchical residual codes, and their future. See README.md beside this file."""

from vpfast.models.shrvqvae.codes import Codes, CodesError
from vpfast.models.shrvqvae.config import PRESETS, SHRVQVAEConfig
from vpfast.models.shrvqvae.hrvqvae import HRVQVAE, HRVQVAEOutput, hrvqvae_loss
from vpfast.models.shrvqvae.loss import JointTerms, joint_loss, joint_terms, prior_loss
from vpfast.models.shrvqvae.sampler import sample, sample_naively
from vpfast.models.shrvqvae.shrvqvae import SHRVQVAE, SHRVQVAEOutput, SHRVQVAEState
from vpfast.models.shrvqvae.st_pixelcnn import STPixelCNN

__all__ = [
    "HRVQVAE",
    "PRESETS",
    "SHRVQVAE",
    "Codes",
    "CodesError",
    "HRVQVAEOutput",
    "JointTerms",
    "SHRVQVAEConfig",
    "SHRVQVAEOutput",
    "SHRVQVAEState",
    "STPixelCNN",
    "hrvqvae_loss",
    "joint_loss",
    "joint_terms",
    "prior_loss",
    "sample",
    "sample_naively",
]
