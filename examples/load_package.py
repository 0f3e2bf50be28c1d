"""Predict with an exported model. vpfast's operators must be installed; the code of its models is not used.

    vpfast export --weights run/weights --frames 10 --size 64 64 --horizon 10 --out model.pt2
    python examples/load_package.py model.pt2 frames.npy prediction.npy

``frames.npy`` holds what the model was exported for: float (B, T, C, H, W) in [0, 1].
"""

import argparse
import os
import sys
import zipfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import vpfast.ops  # noqa: F401 - registers the operators that the file calls


def load(path: str) -> Callable[[Tensor], Tensor]:
    """What ``vpfast export`` wrote, in either format, as a function of frames."""
    with zipfile.ZipFile(path) as archive:
        compiled = any("/aotinductor/" in name for name in archive.namelist())
    if compiled:
        # Compiled code takes frames of another shape for what it was made for, unless it is told to look.
        os.environ.setdefault("AOTI_RUNTIME_CHECK_INPUTS", "1")
        return torch._inductor.aoti_load_package(path)
    return torch.export.load(path).module()


def main(model: str, source: str, target: str) -> None:
    predict = load(model)
    with torch.inference_mode():
        prediction = predict(torch.from_numpy(np.load(source)))
    np.save(target, prediction.numpy())
    imported = sorted(name for name in sys.modules if name.startswith(("vpfast.models", "vpfast.nn")))
    assert not imported, f"the models' code was imported after all: {imported}"
    print(f"{tuple(prediction.shape)}: {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a file that vpfast export wrote")
    parser.add_argument("frames", help=".npy file: float32 (B, T, C, H, W) in [0, 1]")
    parser.add_argument("prediction", help=".npy file to write")
    given = parser.parse_args()
    main(given.model, given.frames, given.prediction)
