"""``vpfast encode``: a video as the codes of a trained HR-VQVAE, bit-packed into a file."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vpfast._files import new_file
from vpfast.cli import Parser
from vpfast.cli._out import check_out_file
from vpfast.cli._video import add_video_options, batches, fit_of, frame_size, from_zero, positive, read_autoencoder
from vpfast.data import VideoError
from vpfast.data.resize import Fit
from vpfast.data.video import iter_video
from vpfast.models import HRVQVAE, Codes
from vpfast.training.device import pick_device
from vpfast.training.recipes import counted

DESCRIPTION = (
    "Write the frames of a video as the codes of a trained HR-VQVAE. The file opens with `vpfast decode` and the same "
    "weights, and in Python with Codes.from_bytes. Frames pass a few at a time; only their codes are kept in memory."
)

_FRAMES_AT_ONCE = 32


def run(argv: Sequence[str]) -> int:
    """Encode; returns 0. Nothing is left behind where something fails."""
    options = _parse(argv)
    check_out_file(options.out, options.force)
    model, trained = read_autoencoder(options.weights)
    size, fit = frame_size(options.size, trained), fit_of(trained)
    codes = _encode(model.to(pick_device(options.device)), options, size, fit)
    data = codes.to_bytes()
    with new_file(options.out, options.force) as draft:
        draft.write_bytes(data)
    (height, width), colour = codes.frame_size, "RGB" if codes.channels == 3 else "grey"
    print(
        f"{counted(len(codes), 'frame')} of {options.video}, {height}x{width} {colour}, in "
        f"{counted(codes.layers, 'layer')} of {codes.codebook_size}: {options.out}\n{len(data):,} bytes, "
        f"{codes.frame_bytes / len(data):.2f} times smaller than 8-bit frames ({codes.frame_bytes:,} bytes)"
    )
    return 0


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(prog="vpfast encode", description=DESCRIPTION, allow_abbrev=False)
    add_video_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the file to write, such as clip.vpc")
    parser.add_argument("--start", type=from_zero, default=0, help="the first frame to encode, from 0")
    parser.add_argument("--count", type=positive, help="how many frames (default: all that follow)")
    return parser.parse_args(argv)


def _encode(model: HRVQVAE, options: Any, size: tuple[int, int] | None, fit: Fit) -> Codes:
    stop = None if options.count is None else options.start + options.count
    frames = islice(iter_video(options.video, size, model.config.in_channels, fit), options.start, stop)
    device = next(model.parameters()).device
    shown = tqdm(frames, desc="encode", unit="frame", disable=None, leave=False)
    parts = [model.encode(part.to(device)).to("cpu") for part in batches(shown, _FRAMES_AT_ONCE)]
    if not parts:
        raise VideoError(f"{options.video}: has no frame from --start {options.start} on (frames count from 0)")
    return Codes.cat(parts)
