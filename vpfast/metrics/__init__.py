"""The errors of predicted frames, under named protocols: MSE, MAE, PSNR, SSIM and LPIPS."""

from vpfast.metrics.perceptual import Perceptual
from vpfast.metrics.protocols import EXACT_PSNR, PROTOCOLS
from vpfast.metrics.ssim import structural_similarity
from vpfast.metrics.video_metrics import Report, VideoMetrics

__all__ = ["EXACT_PSNR", "PROTOCOLS", "Perceptual", "Report", "VideoMetrics", "structural_similarity"]
