"""``vpfast decode``: the frames of a file that ``vpfast encode`` wrote."""

import argparse
import mimetypes
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vpfast._files import new_file, new_folder
from vpfast.cli import Parser
from vpfast.cli._out import check_out_file, check_out_folder
from vpfast.cli._video import add_model_options, positive, read_autoencoder
from vpfast.data._files import open_regular
from vpfast.models import HRVQVAE, Codes
from vpfast.models.shrvqvae import CodesError
from vpfast.training.device import pick_device
from vpfast.training.recipes import counted
from vpfast.visual import write_gif, write_mp4

DESCRIPTION = """Make frames again of a file of codes, with the weights that encoded them. An output that ends in .gif,
.mp4 or .npy is that file; any other is a folder that receives

  decoded.npy   the frames: float32 (T, C, H, W) in [0, 1]
  decoded.gif   the same to look at
  decoded.mp4   the same"""

FILES = frozenset({"decoded.npy", "decoded.gif", "decoded.mp4"})

_FRAMES_AT_ONCE = 32
_WRITERS: dict[str, Callable[[Path, Tensor, float], None]] = {".gif": write_gif, ".mp4": write_mp4}


def run(argv: Sequence[str]) -> int:
    """Decode and write; returns 0. Nothing is left behind where something fails."""
    options = _parse(argv)
    one_file = _is_file(options.out)
    replace: bool | frozenset[str] = options.force
    if one_file:
        check_out_file(options.out, options.force)
    else:
        replace = check_out_folder(options.out, options.force, FILES)
    model, _ = read_autoencoder(options.weights)
    codes = _read(options.file, options.layers, model)
    model.to(pick_device(options.device))
    if one_file:
        _write_file(options.out, codes, model, options)
    else:
        with new_folder(options.out, replace) as folder:
            frames = _decode(folder / "decoded.npy", codes, model)
            for suffix, write in _WRITERS.items():
                write(folder / f"decoded{suffix}", frames, options.fps)
    length, depth = counted(len(codes), "frame"), counted(codes.layers, "layer")
    print(f"{length} of {options.file} from {depth} of codes: {options.out}")
    return 0


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="vpfast decode",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="what `vpfast encode` wrote")
    add_model_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder or file to write")
    parser.add_argument("--layers", type=positive, help="decode from so many first layers alone (default: all)")
    parser.add_argument("--fps", type=positive, default=10, help="frames a second of GIF and MP4 (default: 10)")
    return parser.parse_args(argv)


def _is_file(out: Path) -> bool:
    """Whether ``--out`` is one file; ValueError where its name is that of a picture or film of another kind."""
    if out.suffix.lower() in {".npy", *_WRITERS}:
        return True
    kind, _ = mimetypes.guess_type(out.name)
    if kind is not None and kind.startswith(("image/", "video/")):
        raise ValueError(f"--out {out}: must end in .gif, .mp4 or .npy, or be the name of a folder")
    return False


def _read(file: Path, layers: int | None, model: HRVQVAE) -> Codes:
    """The codes in ``file``, checked against the model."""
    try:
        with open_regular(file) as data:
            codes = Codes.from_bytes(data.read(), layers)
        if len(codes.shape) != 4 or len(codes) == 0:
            raise CodesError(f"holds codes of shape {tuple(codes.shape)}, must be those of one clip, (T, h, w, n)")
        model.decode(codes[:0])
    except OSError as error:
        raise CodesError(f"{file}: cannot be read ({error.strerror})") from error
    except CodesError as error:
        raise CodesError(f"{file}: {error}") from error
    return codes


def _decode(path: Path, codes: Codes, model: HRVQVAE) -> Tensor:
    """The frames, float32 (T, C, H, W), in an .npy file that is made at ``path`` and stays on the disk."""
    shape = (len(codes), codes.channels, *codes.frame_size)
    kept = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    starts = range(0, len(codes), _FRAMES_AT_ONCE)
    for start in tqdm(starts, desc="decode", unit="batch", disable=None, leave=False):
        part = codes[start : start + _FRAMES_AT_ONCE]
        kept[start : start + _FRAMES_AT_ONCE] = model.decode(part).float().cpu().numpy()
    kept.flush()
    return torch.from_numpy(kept)


def _write_file(out: Path, codes: Codes, model: HRVQVAE, options: Any) -> None:
    with new_file(out, options.force) as draft:
        if out.suffix.lower() == ".npy":
            _decode(draft, codes, model)
            return
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as scratch:
            frames = _decode(Path(scratch) / "decoded.npy", codes, model)
            _WRITERS[out.suffix.lower()](draft, frames, options.fps)
