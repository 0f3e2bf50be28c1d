"""Reading videos: moving digits, folders of videos, single videos. Every clip is float32 (T, C, H, W) in [0, 1]."""

from vpfast.data.errors import DataError, VideoError
from vpfast.data.idx import read_idx
from vpfast.data.moving_digits import MovingDigits
from vpfast.data.prepared import PreparedClips
from vpfast.data.resize import resize_frames, to_grey
from vpfast.data.video import read_video
from vpfast.data.video_folder import VideoFolder, find_videos

__all__ = [
    "DataError",
    "MovingDigits",
    "PreparedClips",
    "VideoError",
    "VideoFolder",
    "find_videos",
    "read_idx",
    "read_video",
    "resize_frames",
    "to_grey",
]
