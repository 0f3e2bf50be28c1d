"""What "crop" means, pixel by pixel, beside PredNet's procedure done with Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from vpfast.data.resize import resize_frames


def prednet(frame, height, width):
    """Resize to the height, cut the middle out of the width."""
    scale = height / frame.shape[0]
    image = Image.fromarray(frame).resize((round(scale * frame.shape[1]), height), Image.Resampling.BILINEAR)
    left = (image.width - width) // 2
    return np.asarray(image)[:, left : left + width]


@pytest.mark.parametrize("shape", [(375, 1242), (370, 1224), (480, 640)])
def test_crop_is_prednets_resizing_and_centre_crop(shape):
    """KITTI's sizes and Caltech's to 128x160, on noise: a shift of a part of a pixel would show."""
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    ours = resize_frames(torch.from_numpy(frame).permute(2, 0, 1)[None], (128, 160), "crop")[0].permute(1, 2, 0).numpy()
    off = np.abs(ours.astype(int) - prednet(frame, 128, 160))
    assert off.max() <= 1  # Pillow rounds after each of its two passes


def test_a_long_frame_is_cropped_in_little_memory():
    """16 x 200,000 pixels to 512x512 is 512 x 6,400,000 where it is resized whole: 40 GB."""
    long = torch.zeros(1, 3, 16, 200_000, dtype=torch.uint8)
    long[..., 99_991:100_009] = 200  # a pixel more than the square
    assert resize_frames(long, (512, 512), "crop").min() == 200
    assert resize_frames(long.transpose(2, 3), (512, 512), "crop").min() == 200


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (37, 53), (200, 200)])
@pytest.mark.parametrize("size", [(1, 1), (64, 64), (3, 50), (50, 3)])
def test_any_shape_to_any_size(shape, size):
    frames = torch.full((2, 3, *shape), 137, dtype=torch.uint8)
    cropped = resize_frames(frames, size, "crop")
    assert cropped.shape == (2, 3, *size)
    assert cropped.is_contiguous()
    assert (cropped == 137).all()
