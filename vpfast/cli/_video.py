"""What the commands share that show a video to a trained model."""

import argparse
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from vpfast.data.resize import LARGEST, Fit
from vpfast.models import HRVQVAE, SHRVQVAE
from vpfast.training import TrainConfig
from vpfast.training.checkpoint import read_weights
from vpfast.training.config import MOST

WEIGHTS_HELP = "a folder of weights, a checkpoint, or the name mspn-one-digit or shrvqvae-one-digit"


def positive(text: str) -> int:
    """A whole number of at least 1, as an argparse type."""
    return _whole(text, 1)


def from_zero(text: str) -> int:
    """A whole number of at least 0, as an argparse type."""
    return _whole(text, 0)


def side(text: str) -> int:
    """The height or width of a frame, as an argparse type."""
    return _whole(text, 1, LARGEST)


def _whole(text: str, lowest: int, most: int = MOST) -> int:
    number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,20}", text) else None
    if number is None or number < lowest:
        raise argparse.ArgumentTypeError(f"{text} given, must be a whole number of at least {lowest}")
    if number > most:
        raise argparse.ArgumentTypeError(f"{text} given, must be at most {most}")
    return number


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """The video, how large its frames are to be, and what :func:`add_model_options` adds."""
    parser.add_argument("video", type=Path, help="a video file, or a folder of frames")
    parser.add_argument(
        "--size", type=side, nargs=2, metavar=("H", "W"), help="resize the frames (default: as trained)"
    )
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The weights, where they run, and whether what an earlier run wrote may go."""
    parser.add_argument("--weights", type=Path, required=True, help=WEIGHTS_HELP)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="auto takes the GPU if it can")
    parser.add_argument("--force", action="store_true", help="replace the output of an earlier run")


def read_autoencoder(weights: Path) -> tuple[HRVQVAE, TrainConfig | None]:
    """The HR-VQVAE in ``weights``, or that of the S-HR-VQVAE there, and how it was trained where that is known.

    Raises:
        FileNotFoundError, ValueError: no model, a damaged one, or another; the message names the file.
    """
    model, trained = read_weights(weights, HRVQVAE, SHRVQVAE)
    if isinstance(model, SHRVQVAE):
        return model.autoencoder, trained
    assert isinstance(model, HRVQVAE)
    return model, trained


def frame_size(asked: list[int] | None, trained: TrainConfig | None) -> tuple[int, int] | None:
    """(H, W) of the frames: as asked, else as trained, else, None, as they are in the video."""
    if asked is not None:
        return asked[0], asked[1]
    return None if trained is None else trained.data.frame_size


def fit_of(trained: TrainConfig | None) -> Fit:
    """How frames of other proportions are brought to the size: as in training."""
    return "squash" if trained is None else trained.data.fit


def batches(frames: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """uint8 (C, H, W) one by one -> float32 (T, C, H, W) in [0, 1], ``size`` at a time."""
    source = iter(frames)
    while some := list(islice(source, size)):
        yield torch.stack(some).float().div_(255)
