"""``vpfast export``: a trained model as a file that runs without the code it was made of."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vpfast._files import new_file
from vpfast.cli import Parser
from vpfast.cli._out import check_out_file
from vpfast.cli._video import add_model_options, frame_size, positive, side
from vpfast.models import MSPN, SHRVQVAE, Predictor
from vpfast.training.checkpoint import read_weights
from vpfast.training.device import pick_device
from vpfast.training.recipes import counted

DESCRIPTION = """Write a trained model as a file that predicts `horizon` frames from `frames` frames of one size. It
runs where vpfast's operators are installed; its Python code of models is not needed:

  --format aoti     compiled ahead of time by AOTInductor, for `batch` clips at a time, on processors like this one.
                    Needs a C++ compiler, and minutes: a step is written out for every frame seen and predicted
  --format export   what torch.export gives, in seconds, for any number of clips on any processor

examples/load_package.py loads both."""


def run(argv: Sequence[str]) -> int:
    """Export; returns 0. Nothing is left behind where something fails."""
    options = _parse(argv)
    check_out_file(options.out, options.force)
    if options.out.suffix != ".pt2":
        raise ValueError(f"--out must end in .pt2, got {options.out}")
    model, trained = read_weights(options.weights, MSPN, SHRVQVAE)
    assert isinstance(model, MSPN | SHRVQVAE)
    size = frame_size(options.size, trained)
    if size is None:
        raise ValueError(f"--size is needed: nothing beside {options.weights} tells the size of its frames")
    length = options.frames or (trained.context if trained else 10)
    predictor = Predictor(model.to(pick_device(options.device)), options.horizon)
    shape = (options.batch, length, model.config.in_channels, *size)
    example = next(predictor.parameters()).new_zeros(shape)
    if options.format == "aoti":
        predictor.package(example, options.out)
    else:
        program = predictor.export(example)
        with new_file(options.out, options.force) as draft, draft.open("wb") as file:
            torch.export.save(program, file)
    clips = counted(options.batch, "clip") if options.format == "aoti" else "any number of clips"
    print(
        f"{counted(options.horizon, 'frame')} from {counted(length, 'frame')} of {size[0]}x{size[1]}, for {clips}: "
        f"{options.out}, {os.path.getsize(options.out):,} bytes"
    )
    return 0


def _parse(argv: Sequence[str]) -> Any:
    parser = Parser(
        prog="vpfast export",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the file to write, such as model.pt2")
    parser.add_argument("--horizon", type=positive, required=True, help="frames to predict")
    parser.add_argument("--frames", type=positive, help="frames to look at (default: as trained)")
    parser.add_argument("--size", type=side, nargs=2, metavar=("H", "W"), help="of a frame (default: as trained)")
    parser.add_argument("--batch", type=positive, default=1, help="clips at a time, of --format aoti (default: 1)")
    parser.add_argument("--format", choices=("aoti", "export"), default="aoti", help="see above (default: aoti)")
    return parser.parse_args(argv)
