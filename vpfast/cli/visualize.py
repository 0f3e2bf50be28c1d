"""``vpfast visualize``: what the layers of a trained HR-VQVAE hold of a video, as pictures."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpfast.cli import Parser
from vpfast.cli._out import check_out_folder
from vpfast.cli._video import add_video_options, frame_size, from_zero, positive, read_autoencoder
from vpfast.data import read_video
from vpfast.metrics import VideoMetrics
from vpfast.models import HRVQVAE, Codes
from vpfast.training.device import pick_device
from vpfast._files import new_folder
from vpfast.training.recipes import counted
from vpfast.visual import (
    fragment_blur,
    gaussian_blur,
    gaussian_noise,
    salt_and_pepper,
    side_by_side,
    write_code_maps,
    write_depths,
    write_gif,
    write_heat_maps,
    write_repairs,
)

DESCRIPTION = """Show what the layers of a trained HR-VQVAE hold of a video. The output folder receives:

  depths.png     frames, and what is made of them from the first 1 .. n layers of codes, each with its PSNR
  depths.gif     the same as a film
  codes.png      which codeword every layer chose where
  heatmaps.png   how far every layer's codeword lies from its average over the clip: where the layer has news

and, for each way of making the frames worse that is asked for, one of

  blur.png  fragment.png  noise.png  salt-and-pepper.png

the worsened frames and what is made of them from the first 1 .. n layers, each with its PSNR to the real ones."""


class Corruption(NamedTuple):
    """A way of making frames worse: at a level, by a draw where it draws."""

    apply: Callable[[Tensor, Any, int], Tensor]
    level: Callable[[str], Any]
    unit: str
    help: str


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} given, must be a number") from error


# By the option, which is also the name of the picture.
CORRUPTIONS = {
    "blur": Corruption(
        lambda frames, sigma, _: gaussian_blur(frames, sigma), _number, "px", "Gaussian blur of so many pixels"
    ),
    "fragment": Corruption(
        lambda frames, distance, _: fragment_blur(frames, distance),
        positive,
        "px",
        "fragment blur: the mean of four copies, so many pixels apart from the middle",
    ),
    "noise": Corruption(gaussian_noise, _number, "dB", "Gaussian noise, so many dB below the signal"),
    "salt-and-pepper": Corruption(salt_and_pepper, _number, "of pixels", "white and black pixels, this share of all"),
}

FILES = frozenset({"depths.png", "depths.gif", "codes.png", "heatmaps.png", *(f"{name}.png" for name in CORRUPTIONS)})


def run(argv: Sequence[str]) -> int:
    """Encode, decode, draw; returns 0. Nothing is left behind where something fails."""
    options = _parse(argv)
    replace = check_out_folder(options.out, options.force, FILES)
    model, trained = read_autoencoder(options.weights)
    size = frame_size(options.size, trained)
    frames = read_video(options.video, size, model.config.in_channels, options.start, options.count, at_least=1)
    frames = frames.float().div(255)
    device = pick_device(options.device)
    codes = model.to(device).encode(frames.to(device)).to("cpu")
    made = _by_depth(model, codes)
    notes = {name: _smaller(codes.first(depth)) for depth, name in enumerate(made, start=1)}
    told = [f"{name:>10}  {_errors(clip, frames)}  {notes[name]}" for name, clip in made.items()]
    repairs = {name: _repairs(model, frames, name, options) for name in CORRUPTIONS}
    with new_folder(options.out, replace) as folder:
        write_depths(folder / "depths.png", frames, made, notes, options.rows)
        write_gif(folder / "depths.gif", side_by_side({"frame": frames, **made}), options.fps)
        write_code_maps(
            folder / "codes.png",
            frames,
            codes.indices,
            codes.codebook_size,
            model.config.strict_tree,
            options.rows,
        )
        write_heat_maps(folder / "heatmaps.png", frames, _news(model, codes), options.rows)
        for name, runs in repairs.items():
            if runs:
                write_repairs(folder / f"{name}.png", frames, runs, options.rows)
            told += [f"{run}: {_repaired(clips, frames)}" for run, clips in runs.items()]
    print(*told, f"{counted(len(frames), 'frame')} of {options.video}: {options.out}", sep="\n")
    return 0


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="vpfast visualize",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_video_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--start", type=from_zero, default=0, help="the first frame, from 0")
    parser.add_argument("--count", type=positive, default=60, help="at most so many frames (default: 60)")
    parser.add_argument("--rows", type=positive, default=4, help="frames shown in a picture (default: 4)")
    parser.add_argument("--fps", type=positive, default=10, help="frames a second of the GIF (default: 10)")
    for name, corruption in CORRUPTIONS.items():
        parser.add_argument(
            f"--{name}", type=corruption.level, nargs="+", default=[], metavar="LEVEL", help=corruption.help
        )
    parser.add_argument("--seed", type=from_zero, default=0, help="of noise, salt and pepper (default: 0)")
    return parser.parse_args(argv)


def _by_depth(model: HRVQVAE, codes: Codes) -> dict[str, Tensor]:
    """The frames of ``codes`` from the first 1 .. n layers, on the CPU."""
    return {counted(depth, "layer"): model.decode(codes, depth).float().cpu() for depth in range(1, codes.layers + 1)}


def _repairs(model: HRVQVAE, frames: Tensor, name: str, options: Any) -> dict[str, dict[str, Tensor]]:
    """For each level asked for: the frames made worse, and what comes of them by depth."""
    corruption, runs = CORRUPTIONS[name], {}
    device = next(model.parameters()).device
    for level in getattr(options, name.replace("-", "_")):
        try:
            worse = corruption.apply(frames, level, options.seed)
        except ValueError as error:
            raise ValueError(f"--{name} {level}: {error}") from error
        runs[f"{name} {level:g} {corruption.unit}"] = {
            "given": worse,
            **_by_depth(model, model.encode(worse.to(device)).to("cpu")),
        }
    return runs


def _repaired(clips: Mapping[str, Tensor], frames: Tensor) -> str:
    """How near the frames are to the real ones as they were given, and as they came out of all layers."""
    name = list(clips)[-1]
    return f"{_errors(clips['given'], frames)}; from {name} {_errors(clips[name], frames)}"


def _errors(made: Tensor, frames: Tensor) -> str:
    metrics = VideoMetrics()
    metrics.update(made[None], frames[None])
    mean = metrics.compute().mean
    return f"PSNR {mean['psnr']:.2f} dB  SSIM {mean['ssim']:.4f}"


def _smaller(codes: Codes) -> str:
    return f"{codes.frame_bytes / codes.payload_bytes:.4g} times smaller"


def _news(model: HRVQVAE, codes: Codes) -> Tensor:
    """How far each layer's codewords lie from their mean over the clip: (T, h, w, n)."""
    device = next(model.parameters()).device
    with torch.no_grad():
        codewords: Tensor = model.quantizer.get_codes_from_indices(codes.indices.to(device)).float().cpu()
    mean = codewords.flatten(1, -2).mean(dim=1)
    distance: Tensor = torch.linalg.vector_norm(codewords - mean[:, None, None, None], dim=-1)
    return distance.movedim(0, -1)
