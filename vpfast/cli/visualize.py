"""``vpfast visualize``: what the layers of a trained HR-VQVAE hold of a video, as pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpfast.cli import Parser
from vpfast.cli._out import check_out_folder
from vpfast.cli._video import add_video_options, frame_size, from_zero, positive
from vpfast.data import read_video
from vpfast.metrics import VideoMetrics
from vpfast.models import HRVQVAE, Codes
from vpfast.training.checkpoint import read_weights
from vpfast.training.device import pick_device
from vpfast.training.files import new_folder
from vpfast.training.recipes import counted
from vpfast.visual import side_by_side, write_code_maps, write_depths, write_gif, write_heat_maps

DESCRIPTION = """Show what the layers of a trained HR-VQVAE hold of a video. The output folder receives:

  depths.png     frames, and what is made of them from the first 1 .. n layers of codes, each with its PSNR
  depths.gif     the same as a film
  codes.png      which codeword every layer chose where
  heatmaps.png   how far every layer's codeword lies from its average over the clip: where the layer has news"""

FILES = frozenset({"depths.png", "depths.gif", "codes.png", "heatmaps.png"})


def run(argv: Sequence[str]) -> int:
    """Encode, decode, draw; returns 0. Nothing is left behind where something fails."""
    options = _parse(argv)
    replace = check_out_folder(options.out, options.force, FILES)
    model, trained = read_weights(options.weights, HRVQVAE)
    size = frame_size(options.size, trained)
    frames = read_video(options.video, size, model.config.in_channels, options.start, options.count, at_least=1)
    frames = frames.float().div(255)
    device = pick_device(options.device)
    codes = model.to(device).encode(frames.to(device)).to("cpu")
    depths = range(1, codes.layers + 1)
    made = {counted(depth, "layer"): model.decode(codes, depth).float().cpu() for depth in depths}
    notes = {counted(depth, "layer"): _smaller(codes.first(depth)) for depth in depths}
    told = [f"{name:>10}  {_errors(clip, frames)}  {notes[name]}" for name, clip in made.items()]
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
    return parser.parse_args(argv)


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
