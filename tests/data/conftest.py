"""Small videos made here, so that the readers can be tested without any data at hand."""

from fractions import Fraction

import numpy as np
import pytest


def _pattern(frames, height, width):
    """uint8 (T, H, W, 3): a colourful gradient in which a bright square moves; survives lossy coding well."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([255 * x // width, 255 * y // height, np.full_like(x, 80)], axis=2).astype(np.uint8)
    clip = np.repeat(base[None], frames, axis=0)
    for number, frame in enumerate(clip):
        frame[4:10, 2 + number : 8 + number] = 230
    return clip


@pytest.fixture
def pattern():
    """Makes clips: ``pattern(frames, height, width)``."""
    return _pattern


@pytest.fixture
def make_video(tmp_path):
    """Writes a video and returns its path; ``pts`` gives each frame's time in hundredths of a second."""
    import av

    def write(name="clip.mp4", clip=None, codec="libx264", pix_fmt="yuv420p", pts=None, **options):
        clip = _pattern(12, 32, 48) if clip is None else clip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=100, options=options)
            stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pix_fmt
            stream.codec_context.time_base = Fraction(1, 100)
            for number, image in enumerate(clip):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
                frame.pts = number * 4 if pts is None else pts[number]
                frame.time_base = Fraction(1, 100)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path

    return write


@pytest.fixture
def make_frames(tmp_path):
    """Writes a clip as numbered images into a folder and returns the folder."""
    from PIL import Image

    def write(clip, folder="frames", names="frame{}.png"):
        target = tmp_path / folder
        target.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(clip):
            Image.fromarray(image).save(target / names.format(number + 1))
        return target

    return write
