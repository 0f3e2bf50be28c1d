"""Which implementation serves an operator: the choice, and the reasons when there is none."""

import importlib.util
import os
import types
from typing import Literal, get_args

import torch
from torch.autograd import forward_ad

from vpfast.ops import _native

Name = Literal["auto", "native", "triton", "reference"]
NAMES: tuple[str, ...] = get_args(Name)


# Looked for, not imported: that takes a second, and a machine without a GPU may have none.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's own switch, read when it is imported: kernels then run on CPU tensors, for tests, ten thousand times slower.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} {name!r} is unknown; choose one of {', '.join(map(repr, NAMES))}")
    return name


# Checked when it is first used, so that a wrong word does not keep the package from being imported.
_chosen: str = os.environ.get("VPFAST_BACKEND", "auto")


class BackendError(RuntimeError):
    """No implementation of an operator serves this device under the current choice; the message says why."""


class backend:
    """Choose which implementation the operators use, for good or within a block.

    ``vpfast.backend("reference")`` as a statement sets the choice for the whole process; ``with
    vpfast.backend("reference"):`` restores the previous one at the end of the block.

    ``"auto"`` (the default) takes the compiled kernel, then Triton on a GPU; on the CPU it ends at the plain PyTorch
    reference, on a GPU at an error, never at a silently slow path. ``"native"``, ``"triton"`` and ``"reference"``
    insist on one. The choice is read when an operator is called, or traced by ``torch.compile`` and ``torch.export``.
    It belongs to the process, not to a thread. The environment's ``VPFAST_BACKEND`` is what a process begins with.

    Raises:
        ValueError: the name is none of these four.
    """

    def __init__(self, name: Name) -> None:
        global _chosen
        self._name = name
        self._previous, _chosen = _chosen, _checked(name, "backend")

    def __enter__(self) -> "backend":
        global _chosen
        if _chosen != self._name:  # kept for later, or entered a second time
            self._previous, _chosen = _chosen, self._name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._previous


def current_backend() -> str:
    """The name last chosen with :class:`backend`.

    Raises:
        ValueError: it comes from the environment's ``VPFAST_BACKEND`` and is unknown.
    """
    return _checked(_chosen, "VPFAST_BACKEND")


class Backends:
    """The implementations that one operator has in this installation.

    ``native`` holds the device types with a compiled kernel, ``triton`` tells whether a Triton kernel exists.
    """

    def __init__(self, op: str, native: tuple[str, ...], triton: bool) -> None:
        self.op = op
        self.native = native
        self.triton = triton

    def serves(self, name: str, device: str) -> bool:
        """Can backend ``name`` serve ``device``? What ``torch.compile`` traces, so it reads no file to give reasons."""
        if name == "native":
            return _native.extension is not None and device in self.native
        if name == "triton":
            return self.triton and _HAS_TRITON and (device == "cuda" or (device == "cpu" and _INTERPRETED))
        return name == "reference"

    def refusal(self, name: str, device: str) -> str | None:
        """Why backend ``name`` cannot serve ``device``; None if it can."""
        if self.serves(name, device):
            return None
        if name == "native":
            if _native.extension is None:
                return _native.why_missing()
            return f"no compiled kernel for {device} tensors (there is one for: {', '.join(self.native) or 'none'})"
        if not self.triton:
            return "this operator has no Triton kernel"
        if not _HAS_TRITON:
            return "Triton is not installed (pip install triton; a CUDA build of torch brings it)"
        return f"Triton kernels need a CUDA tensor, not {device}"

    def select(self, device: str) -> str:
        """The backend that serves a tensor on ``device`` under the current choice.

        Raises:
            BackendError: none can; the message lists every backend and why it was refused.
        """
        chosen = current_backend()
        if chosen != "auto":
            if self.serves(chosen, device):
                return chosen
            return self._refuse(device, (chosen,))
        if device == "cpu":
            return "native" if self.serves("native", device) else "reference"
        for name in ("native", "triton"):
            if self.serves(name, device):
                return name
        return self._refuse(device, ("native", "triton"))

    def _refuse(self, device: str, asked: tuple[str, ...]) -> str:
        reasons = "; ".join(f"{name}: {self.refusal(name, device)}" for name in asked)
        raise BackendError(
            f"vpfast.{self.op} has no backend for this {device} tensor under vpfast.backend({_chosen!r}). {reasons}. "
            'vpfast.backend("reference"), or VPFAST_BACKEND=reference in the environment, runs the plain PyTorch '
            "version on any device; `vpfast doctor` shows what is installed."
        )


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Does a ``torch.func`` transform or forward-mode differentiation look at one of these?

    Those see through plain PyTorch only: they would take a compiled kernel for a constant, in silence.
    """
    if torch.compiler.is_compiling():
        return False
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def autocast_is_on(tensor: torch.Tensor) -> bool:
    """Is ``torch.autocast`` enabled for the device of ``tensor``?"""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def native_devices(qualified_op: str) -> tuple[str, ...]:
    """Device types that the loaded extension registered a kernel of ``qualified_op`` for."""
    if _native.extension is None:
        return ()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(key.lower() for key in ("CPU", "CUDA") if has_kernel(qualified_op, key))
