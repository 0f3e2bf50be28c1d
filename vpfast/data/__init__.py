"""Video in: moving digits, folders of videos, single videos. Every clip is float32 (T, C, H, W) in [0, 1]."""

from vpfast.data.errors import DataError, VideoError
from vpfast.data.idx import read_idx
from vpfast.data.moving_digits import MovingDigits
from vpfast.data.prepared import PreparedClips
from vpfast.data.video import read_video
from vpfast.data.video_folder import VideoFolder

__all__ = ["DataError", "MovingDigits", "PreparedClips", "VideoError", "VideoFolder", "read_idx", "read_video"]
