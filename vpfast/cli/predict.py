"""``vpfast predict``: how a video goes on, as pictures and numbers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpfast.cli import Parser
from vpfast.cli._out import check_out_folder
from vpfast.cli._video import add_video_options, frame_size, positive
from vpfast.data import VideoError, read_video
from vpfast.models import MSPN
from vpfast.training.checkpoint import read_weights
from vpfast.training.device import pick_device
from vpfast.training.files import new_folder
from vpfast.training.recipes import counted
from vpfast.visual import side_by_side, write_gif, write_mp4, write_strip

DESCRIPTION = """Predict the frames that follow `context` real frames of a video. The output folder receives:

  prediction.npy   the predicted frames alone: float32 (horizon, C, H, W) in [0, 1]
  prediction.gif   the real frames, then the prediction; beside what really followed where the video has it
  prediction.mp4   the same
  strip.png        the frames in rows: what really happened and the difference where known, and the prediction"""


# What an output folder holds, and all that --force may take away with it.
FILES = frozenset({"prediction.npy", "prediction.gif", "prediction.mp4", "strip.png"})


def run(argv: Sequence[str]) -> int:
    """Predict and write; returns 0. Nothing is left behind where something fails."""
    options = _parse(argv)
    replace = check_out_folder(options.out, options.force, FILES)
    model, trained = read_weights(options.weights, MSPN)
    model.eval()
    if options.context is None:
        options.context = trained.context if trained else 10
    frames = _read(options, frame_size(options.size, trained), channels=model.config.in_channels)
    context, future = frames[: options.context], frames[options.context :]
    device = pick_device(options.device)
    predicted = model.to(device).predict(context.unsqueeze(0).to(device), horizon=options.horizon)
    prediction = predicted[0].float().clamp(0, 1).cpu()
    with new_folder(options.out, replace) as folder:
        _write(folder, context, prediction, future, options.fps)
    if 0 < future.shape[0] < options.horizon:
        print(
            f"vpfast: {options.video} ends after {future.shape[0]} of the {options.horizon} frames predicted, so what "
            f"really followed is not shown; --horizon {future.shape[0]} shows it",
            file=sys.stderr,
        )
    print(f"{counted(options.horizon, 'frame')} predicted from {options.context} of {options.video}: {options.out}")
    return 0


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="vpfast predict",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_video_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--horizon", type=positive, default=20, help="frames to predict (default: 20)")
    parser.add_argument("--context", type=positive, help="real frames to look at (default: as trained)")
    parser.add_argument("--start", type=int, default=0, help="the first of them; negative counts from the end")
    parser.add_argument("--fps", type=positive, default=10, help="frames a second of GIF and MP4 (default: 10)")
    return parser.parse_args(argv)


def _read(options: Any, size: tuple[int, int] | None, channels: int) -> Tensor:
    """Context and, as far as the video goes, what followed: float32 (T, C, H, W) in [0, 1]."""
    wanted = options.context + options.horizon
    if options.start >= 0:
        at_least = options.context
        frames = read_video(options.video, size, channels, options.start, count=wanted, at_least=at_least)
    else:
        video = read_video(options.video, size, channels)
        if -options.start > video.shape[0]:
            raise VideoError(f"{options.video}: --start {options.start} given, but it has {video.shape[0]} frames")
        frames = video[options.start :][:wanted]
        if frames.shape[0] < options.context:
            raise VideoError(
                f"{options.video}: {frames.shape[0]} frames from --start {options.start} on, "
                f"fewer than the {options.context} of --context"
            )
    return frames.float().div(255)


def _write(folder: Path, context: Tensor, prediction: Tensor, future: Tensor, fps: int) -> None:
    np.save(folder / "prediction.npy", prediction.numpy())
    clips = {"prediction": torch.cat([context, prediction])}
    if future.shape[0] == prediction.shape[0]:
        clips = {"truth": torch.cat([context, future]), **clips}
    film = side_by_side(clips, context=context.shape[0])
    write_gif(folder / "prediction.gif", film, fps)
    write_mp4(folder / "prediction.mp4", film, fps)
    write_strip(folder / "strip.png", clips, context=context.shape[0])
