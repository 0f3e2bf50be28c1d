"""``predict`` of a model for so many frames, as a module of its own: what is compiled, exported and packaged."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from vpfast._files import file_refusal, new_file
from vpfast.models._frames import check_count, check_frames
from vpfast.models.mspn import MSPN
from vpfast.models.shrvqvae import SHRVQVAE


class Predictor(nn.Module):
    """The ``horizon`` frames that follow: (B, T, C, H, W) -> (B, horizon, C, H, W), the likeliest, without gradients.

    >>> predictor = Predictor(model.eval(), horizon=10)
    >>> future = torch.compile(predictor, fullgraph=True)(frames)
    >>> torch.export.save(predictor.export(frames), "exported.pt2")
    >>> predictor.package(frames, "compiled.pt2")

    The two files run where ``vpfast.ops`` of the same version is imported; the models' code is not needed:

    >>> future = torch.export.load("exported.pt2").module()(frames)
    >>> future = torch._inductor.aoti_load_package("compiled.pt2")(frames)

    A step of the model is written out for every frame, so that compiling takes time in proportion to T + horizon.
    Compiled code does not look at the frames' values; values that are not finite inside the network end an S-HR-VQVAE
    with a RuntimeError. An S-HR-VQVAE needs vpfast's compiled kernels, where it is compiled and where it runs, unless
    its ``conditioning`` is ``"past_frames"``.

    Args:
        model: an :class:`MSPN` or :class:`SHRVQVAE` in evaluation mode. It is copied.
        horizon: how many frames to predict, 1 or more.

    Raises:
        TypeError: another model, or a horizon that is no integer.
        ValueError: a horizon below 1, or a model in training mode.
    """

    def __init__(self, model: MSPN | SHRVQVAE, horizon: int) -> None:
        super().__init__()
        if not isinstance(model, MSPN | SHRVQVAE):
            raise TypeError(f"Predictor takes an MSPN or an SHRVQVAE, got {type(model).__name__}")
        if model.training:
            raise ValueError("the model is in training mode; call model.eval() first")
        self.horizon = check_count("horizon", horizon, lowest=1)
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.eval()

    def forward(self, frames: Tensor) -> Tensor:
        """``model.predict(frames, horizon)``, with its errors."""
        prediction: Tensor = self.model.predict(frames, self.horizon)
        return prediction

    @torch.no_grad()
    def export(self, frames: Tensor, any_batch: bool = True) -> torch.export.ExportedProgram:
        """What ``torch.export`` gives for frames of the shape and type of ``frames``. It checks that shape when called.

        Args:
            frames: (B, T, C, H, W), T at least 1. Only its shape and type count.
            any_batch: whether the program is for any B of at least 1, or for that of ``frames`` alone.

        Raises:
            TypeError, ValueError: frames that the model does not take.
            BackendError: (a RuntimeError) an S-HR-VQVAE that no compiled kernel serves; the message says what does.
        """
        config = self.model.config
        check_frames(frames, "B, T, C, H, W", config.in_channels, config.multiple, next(self.parameters()))
        if frames.shape[1] == 0:
            raise ValueError("frames hold no time step (T = 0); give at least one frame")
        if not any_batch:
            return torch.export.export(self, (frames.new_zeros(frames.shape),))
        example = frames.new_zeros(2, *frames.shape[1:])  # the one of a single clip would be taken for a constant
        return torch.export.export(self, (example,), dynamic_shapes={"frames": {0: torch.export.Dim("batch", min=1)}})

    def package(self, frames: Tensor, path: str | os.PathLike[str]) -> Path:
        """Compile ahead of time what :meth:`export` gives, by AOTInductor, into the file ``path`` ending in ``.pt2``.

        The package is for the shape of ``frames``, B included: left open, AOTInductor's B would begin at 2. It is for
        processors like this one, takes a C++ compiler, and minutes for a model of the papers. A file of its name is
        replaced; the number of threads is free. It does not check what it is called with unless the environment says
        ``AOTI_RUNTIME_CHECK_INPUTS=1`` there: frames of another shape, or not contiguous, give nonsense.

        Returns:
            ``path``.

        Raises:
            ValueError: another ending.
            FileExistsError: ``path`` cannot be written.
            FileNotFoundError: there is no C++ compiler. Further errors as for :meth:`export`.
        """
        path = Path(path)
        if path.suffix != ".pt2":
            raise ValueError(f"a package's name ends in .pt2, got {path}")
        if (reason := file_refusal(path, replace=True)) is not None:
            raise FileExistsError(f"{path} {reason}")
        _check_compiler()
        program = self.export(frames, any_batch=False)
        # The name goes into the archive: a draft's would stay there.
        with TemporaryDirectory() as folder, new_file(path, replace=True) as draft, catch_warnings():
            simplefilter("ignore", FutureWarning)  # torch tells itself what it will change
            compiled = torch._inductor.aoti_compile_and_package(
                program, package_path=str(Path(folder, path.name)), inductor_configs={"cpp.dynamic_threads": True}
            )
            copyfile(compiled, draft)
        return path


def _check_compiler() -> None:
    from torch._inductor import cpp_builder, exc  # a second to import, which predicting does not need

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise FileNotFoundError(
            "no C++ compiler was found, which packaging ahead of time takes: install g++, or name one in CXX; what is "
            "exported and not packaged takes none"
        ) from error
