"""``vpfast predict``: how a video goes on, as pictures and numbers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vpfast import optimize
from vpfast._files import new_folder
from vpfast.cli import Parser, _live
from vpfast.cli._out import check_out_folder
from vpfast.cli._video import add_video_options, fit_of, frame_size, from_zero, positive
from vpfast.data import VideoError, read_video
from vpfast.data.resize import Fit
from vpfast.models import MSPN, SHRVQVAE
from vpfast.training.checkpoint import read_weights
from vpfast.training.device import pick_device
from vpfast.training.recipes import Sampling, counted, recipe_of
from vpfast.visual import side_by_side, write_gif, write_mp4, write_strip

DESCRIPTION = """Predict the frames that follow `context` real frames of a video. The output folder receives:

  prediction.npy   the predicted frames alone: float32 (horizon, C, H, W) in [0, 1]
  prediction.gif   the real frames, then the prediction; beside what really followed where the video has it
  prediction.mp4   the same
  strip.png        the frames in rows: what really happened and the difference where known, and the prediction

An S-HR-VQVAE predicts what is likeliest at --temperature 0; above it the future is drawn, and --futures draws several:
prediction.npy is then (futures, horizon, C, H, W), and the pictures show them beside each other.

With --live the video is read frame by frame, as a camera would give it, and after each frame the next one is predicted,
or the one --horizon further on. It prints how long that took a frame and how well what came had been predicted; --out
is a film of both, .mp4, or left out. Memory does not grow with the video. Ctrl-C and SIGTERM end it after the frame at
hand, report on the frames so far, and close the film properly."""


# What an output folder holds, and all that --force may take away with it.
FILES = frozenset({"prediction.npy", "prediction.gif", "prediction.mp4", "strip.png"})

_ONLY_LIVE = ("frames", "loop", "pace", "bfloat16", "json")
_NEVER_LIVE = ("start", "temperature", "top_k", "futures", "seed")


def run(argv: Sequence[str]) -> int:
    """Predict and write; returns 0. Nothing is left behind where something fails."""
    options = _parse(argv)
    if options.live:
        return _live.run(options)
    replace = check_out_folder(options.out, options.force, FILES)
    model, trained = read_weights(options.weights, MSPN, SHRVQVAE)
    assert isinstance(model, MSPN | SHRVQVAE)
    sampling = Sampling(options.temperature, options.top_k, options.futures or 1, options.seed)
    recipe_of(model).check_sampling(sampling)
    if options.context is None:
        options.context = trained.context if trained else 10
    frames = _read(options, frame_size(options.size, trained), model.config.in_channels, fit_of(trained))
    context, future = frames[: options.context], frames[options.context :]
    device = pick_device(options.device)
    futures = _predict(model.to(device), context.unsqueeze(0).to(device), options.horizon, sampling)
    with new_folder(options.out, replace) as folder:
        np.save(folder / "prediction.npy", (futures[0] if options.futures is None else futures).numpy())
        _draw(folder, context, futures, future, options.fps)
    if 0 < future.shape[0] < options.horizon:
        print(
            f"vpfast: {options.video} ends after {future.shape[0]} of the {options.horizon} frames predicted, so what "
            f"really followed is not shown; --horizon {future.shape[0]} shows it",
            file=sys.stderr,
        )
    many = "" if options.futures is None else f" in {counted(options.futures, 'future')}"
    predicted = f"{counted(options.horizon, 'frame')} predicted from {options.context} of {options.video}"
    print(f"{predicted}{many}: {options.out}")
    return 0


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="vpfast predict",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_video_options(parser)
    parser.add_argument("--out", type=Path, help="the folder to write; with --live a film, .mp4")
    parser.add_argument(
        "--horizon", type=positive, help="frames to predict (default: 20); with --live how far ahead (default: 1)"
    )
    parser.add_argument(
        "--context",
        type=positive,
        help="real frames to look at (default: as trained); with --live so many an S-HR-VQVAE remembers",
    )
    parser.add_argument("--start", type=int, help="the first of them; negative counts from the end (default: 0)")
    parser.add_argument(
        "--fps",
        type=positive,
        help=f"frames a second of GIF and MP4 (default: {_live.FPS}, with --live the video's own)",
    )
    parser.add_argument("--temperature", type=float, help="S-HR-VQVAE: 0 takes the likeliest (default: 0)")
    parser.add_argument(
        "--top-k", "--top_k", type=positive, help="S-HR-VQVAE: draw among so many codewords (default: all)"
    )
    parser.add_argument("--futures", type=positive, help="S-HR-VQVAE: draw so many futures")
    parser.add_argument("--seed", type=from_zero, help="S-HR-VQVAE: of what is drawn (default: 0)")
    live = parser.add_argument_group("frame by frame")
    live.add_argument("--live", action="store_true", help="predict after each frame of the video, from the first on")
    live.add_argument("--frames", type=positive, help="end after so many frames")
    live.add_argument(
        "--loop", action="store_true", help="begin the video again where it ends, until --frames or Ctrl-C"
    )
    live.add_argument(
        "--pace",
        action="store_true",
        help="wait for each frame as for a camera's, and drop frames that arrive too fast",
    )
    live.add_argument(
        "--bfloat16", action="store_true", help="compute in it where the processor can, faster and less exact"
    )
    live.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return _completed(parser, parser.parse_args(argv))


def _completed(parser: Parser, options: Any) -> Any:
    """The options with their defaults; complains of those that do not go together."""
    if options.out is None and not options.live:
        parser.error("--out is needed: the folder to write")
    for name in _NEVER_LIVE if options.live else _ONLY_LIVE:
        given = getattr(options, name)
        if given is not None and given is not False:
            parser.error(f"--{name.replace('_', '-')} {'does not go' if options.live else 'goes only'} with --live")
    defaults = {"horizon": 1 if options.live else 20, "start": 0, "temperature": 0.0, "seed": 0}
    if not options.live:
        defaults["fps"] = _live.FPS
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _predict(model: MSPN | SHRVQVAE, context: Tensor, horizon: int, sampling: Sampling) -> Tensor:
    """(1, T, C, H, W) -> (futures, horizon, C, H, W) on the CPU, float32 in [0, 1]."""
    if isinstance(model, MSPN):
        # Not on a GPU: one clip is over before its graph would be recorded.
        fast = model if context.is_cuda else optimize(model.eval())
        futures = fast.predict(context, horizon=horizon)
    else:
        futures = model.predict(
            context,
            horizon=horizon,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            num_futures=sampling.futures,
            seed=sampling.seed,
            progress=sys.stderr.isatty(),
        )[0]
    return futures.float().clamp(0, 1).cpu()


def _read(options: Any, size: tuple[int, int] | None, channels: int, fit: Fit) -> Tensor:
    """Context and, as far as the video goes, what followed: float32 (T, C, H, W) in [0, 1]."""
    wanted = options.context + options.horizon
    if options.start >= 0:
        frames = read_video(options.video, size, channels, options.start, wanted, fit, at_least=options.context)
    else:
        video = read_video(options.video, size, channels, fit=fit)
        if -options.start > video.shape[0]:
            raise VideoError(f"{options.video}: --start {options.start} given, but it has {video.shape[0]} frames")
        frames = video[options.start :][:wanted]
        if frames.shape[0] < options.context:
            raise VideoError(
                f"{options.video}: {frames.shape[0]} frames from --start {options.start} on, "
                f"fewer than the {options.context} of --context"
            )
    return frames.float().div(255)


def _draw(folder: Path, context: Tensor, futures: Tensor, real: Tensor, fps: int) -> None:
    names = ["prediction"] if len(futures) == 1 else [f"future {number}" for number in range(1, len(futures) + 1)]
    clips = {name: torch.cat([context, future]) for name, future in zip(names, futures, strict=True)}
    if real.shape[0] == futures.shape[1]:
        clips = {"truth": torch.cat([context, real]), **clips}
    film = side_by_side(clips, context=context.shape[0])
    write_gif(folder / "prediction.gif", film, fps)
    write_mp4(folder / "prediction.mp4", film, fps)
    write_strip(folder / "strip.png", clips, context=context.shape[0])
