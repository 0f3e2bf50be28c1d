"""How far predicted frames are from real ones, under named protocols."""

from vpfast.metrics.ssim import structural_similarity
from vpfast.metrics.video_metrics import Report, VideoMetrics

__all__ = ["Report", "VideoMetrics", "structural_similarity"]
