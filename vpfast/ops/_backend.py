"""Which implementation serves an operator: the choice, and the reasons when there is none."""

import functools
import importlib.util
import inspect
import os
import types
from collections.abc import Callable, Sequence
from typing import Literal, ParamSpec, TypeVar, cast, get_args

import torch
from torch.autograd import forward_ad

from vpfast.ops import _gpu, _native
from vpfast.ops._tracing import constant_in_traces

Name = Literal["auto", "native", "triton", "reference"]
NAMES: tuple[str, ...] = get_args(Name)
P = ParamSpec("P")
R = TypeVar("R")
Device = torch.device | str

# Looked for, not imported: that takes a second, and a machine without a GPU may have none.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Triton's own switch, read when it is imported: kernels then run on CPU tensors, for tests, ten thousand times slower.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _checked(name: str, where: str) -> Name:
    if name not in NAMES:
        raise ValueError(f"{where} {name!r} is unknown; choose one of {', '.join(map(repr, NAMES))}")
    return cast(Name, name)


# Checked when it is first used, so that a wrong word does not keep the package from being imported.
_chosen: str = os.environ.get("VPFAST_BACKEND", "auto")
_newest: "backend | None" = None
"""Whose making was the last choice, and was not the start of a block or a decorator so far."""
_open_blocks: list[tuple["backend", str]] = []
"""From the outermost: who opened it, and the choice to restore."""


class BackendError(RuntimeError):
    """No implementation of an operator serves this device under the current choice; the message says why."""


class backend:
    """Choose which implementation of the operators is used: from now on, within a block, or within a function.

    ``vpfast.backend("reference")`` as a statement sets the choice for the whole process; ``with
    vpfast.backend("reference"):`` restores the previous one at the end of the block. ``@vpfast.backend("reference")``
    makes every call of a function such a block; generators and coroutines are refused.

    ``"auto"`` (the default) takes the compiled kernel if there is one. Otherwise it takes the plain PyTorch reference
    on the CPU, and on a GPU Triton, or raises an error; it never takes a slow path silently. ``"native"``, ``"triton"``
    and ``"reference"`` take that implementation or raise an error. The choice is read when an operator is called, or
    traced by ``torch.compile`` and ``torch.export``. It holds for the whole process, not for a thread: blocks in two
    threads at once change each other's choice. A process starts with the choice in the environment variable
    ``VPFAST_BACKEND``.

    Raises:
        ValueError: the name is none of these four.
        TypeError: it decorates something else than an ordinary function.
    """

    def __init__(self, name: Name) -> None:
        global _chosen, _newest
        _checked(name, "backend")
        self._name: Name = name
        self._replaced = _chosen
        _chosen, _newest = name, self

    def __enter__(self) -> "backend":
        global _chosen
        _open_blocks.append((self, self._before()))
        _chosen = self._name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        global _chosen
        place = max(i for i, (opener, _) in enumerate(_open_blocks) if opener is self)
        _, before = _open_blocks.pop(place)
        if place == len(_open_blocks):
            _chosen = before
        else:  # a block that was opened within this one is still open, and has to restore what this one would have
            _open_blocks[place] = (_open_blocks[place][0], before)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        global _chosen
        _chosen = self._before()
        later = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        ordinary = inspect.isroutine(function) and not any(runs_later(function) for runs_later in later)
        if not ordinary:
            raise TypeError(
                f"vpfast.backend decorates ordinary functions, got {function!r}; open a block, with "
                f"vpfast.backend({self._name!r}):, in it"
            )

        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with backend(self._name):  # the compiler takes one that it sees made
                return function(*args, **kwargs)

        return within

    def _before(self) -> str:
        """What a block that opens now restores: the choice before this object was made, if that was the last choice."""
        global _newest
        before = self._replaced if _newest is self else _chosen
        _newest = None
        return before


def current_backend() -> Name:
    """The name that was last chosen with :class:`backend`.

    Raises:
        ValueError: it comes from the environment's ``VPFAST_BACKEND`` and is unknown.
    """
    return _checked(_chosen, "VPFAST_BACKEND")


class Backends:
    """The implementations that one operator has in this installation.

    ``native`` holds the device types with a compiled kernel, ``triton`` tells whether a Triton kernel exists, and
    ``cuda_source`` whether csrc has a CUDA kernel, compiled here or not.
    """

    def __init__(self, op: str, native: tuple[str, ...], triton: bool, cuda_source: bool = True) -> None:
        self.op = op
        self.native = native
        self.triton = triton
        self.cuda_source = cuda_source

    def serves(self, name: str, device: Device) -> bool:
        """Can backend ``name`` serve ``device``? What ``torch.compile`` traces, so it reads no file to give reasons."""
        device = torch.device(device)
        on_gpu = device.type == "cuda"
        if name == "native":
            if _native.extension is None or device.type not in self.native:
                return False
            return not on_gpu or _gpu.runs_native(device.index)
        if name == "triton":
            if not (self.triton and _HAS_TRITON):
                return False
            if _INTERPRETED:
                return device.type == "cpu"
            return on_gpu and _gpu.runs_triton(device.index)
        return name == "reference"

    def refusal(self, name: str, device: Device) -> str | None:
        """Why backend ``name`` cannot serve ``device``; None if it can."""
        if self.serves(name, device):
            return None
        return self._no_native(torch.device(device)) if name == "native" else self._no_triton(torch.device(device))

    def _no_native(self, device: torch.device) -> str:
        if device.type == "cuda" and not self.cuda_source:
            return "this operator has no CUDA C++ kernel by design: on a GPU Triton serves it"
        if _native.extension is None:
            return _native.why_missing()
        if device.type in self.native and _gpu.holds_code_for(device.index):
            compiled, known = _gpu.cuda_versions()
            return (
                f"the extension was compiled with CUDA {compiled} and the driver knows CUDA {known}; install a newer "
                "driver, or build it again with an older toolkit (CUDA_HOME)"
            )
        if device.type in self.native:
            return (
                f"the extension holds code for {', '.join(_gpu.built_for())} and {_gpu.described(device.index)}; build "
                "it again with TORCH_CUDA_ARCH_LIST set to that"
            )
        if device.type == "cuda" and not _gpu.built_for():
            return f"the extension was built without CUDA ({_native.build_record()['reason']})"
        return f"no compiled kernel for {device.type} tensors (there is one for: {', '.join(self.native) or 'none'})"

    def _no_triton(self, device: torch.device) -> str:
        if not self.triton:
            return "this operator has no Triton kernel"
        if not _HAS_TRITON:
            return "Triton is not installed (pip install triton; a CUDA build of torch brings it)"
        if device.type != "cuda":
            switch = "" if device.type != "cpu" else " (TRITON_INTERPRET=1 interprets them on the CPU, for tests)"
            return f"Triton kernels need a CUDA tensor, not {device.type}{switch}"
        if _INTERPRETED:
            return "Triton's interpreter is switched on (TRITON_INTERPRET=1): it serves CPU tensors alone, for tests"
        least = ".".join(map(str, _gpu.TRITON_NEEDS))
        return f"Triton needs compute capability {least} or later, and {_gpu.described(device.index)}"

    def select(self, device: Device) -> str:
        """The backend that serves a tensor on ``device`` under the current choice; "cuda" is the current GPU.

        Raises:
            BackendError: none can; the message lists every backend and why it was refused.
        """
        chosen = current_backend()
        if chosen != "auto":
            if self.serves(chosen, device):
                return chosen
            return self._refuse(device, (chosen,))
        if torch.device(device).type == "cpu":
            return "native" if self.serves("native", device) else "reference"
        for name in ("native", "triton"):
            if self.serves(name, device):
                return name
        return self._refuse(device, ("native", "triton"))

    def _refuse(self, device: Device, asked: tuple[str, ...]) -> str:
        reasons = "; ".join(f"{name}: {self.refusal(name, device)}" for name in asked)
        kind = torch.device(device).type
        raise BackendError(
            f"vpfast.{self.op} has no backend for this {kind} tensor under vpfast.backend({_chosen!r}). {reasons}. "
            'vpfast.backend("reference"), or VPFAST_BACKEND=reference in the environment, runs the plain PyTorch '
            "version on any device; `vpfast doctor` shows what is installed."
        )


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Does a ``torch.func`` transform run, or forward-mode differentiation look at one of these?

    What runs within a transform and looks at none of these tensors may not call an ``autograd.Function`` all the same.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or _have_tangents(tensors)


def is_differentiated(*tensors: torch.Tensor) -> bool:
    """The same but for ``vmap``, which the operators have rules of their own for.

    What differentiates sees through plain PyTorch only: it would take a compiled kernel for a constant, in silence.
    """
    if torch.compiler.is_compiling():
        return _derivative_is_traced()
    wrapped = filter(torch._C._functorch.is_functorch_wrapped_tensor, tensors)
    return any(map(_is_wrapped_for_derivatives, wrapped)) or _have_tangents(tensors)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Does ``vmap`` map over it? Then it tells neither its values nor every layout."""
    functorch = torch._C._functorch
    while not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def _have_tangents(tensors: Sequence[torch.Tensor]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _is_wrapped_for_derivatives(tensor: torch.Tensor) -> bool:
    """Is one of the wrappers around it another than that of ``vmap``?"""
    functorch = torch._C._functorch
    while functorch.is_batchedtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return functorch.is_functorch_wrapped_tensor(tensor)


@constant_in_traces
def _derivative_is_traced() -> bool:
    """Is what the compiler traces within ``torch.func.grad`` or the like? Of its tensors a trace tells nothing."""
    functorch = torch._C._functorch
    derivatives = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(level.key() in derivatives for level in functorch.get_interpreter_stack() or ())


def autocast_is_on(tensor: torch.Tensor) -> bool:
    """Is ``torch.autocast`` enabled for the device of ``tensor``?"""
    device = tensor.device.type
    return _has_autocast(device) and torch.is_autocast_enabled(device)


@constant_in_traces
def _has_autocast(device: str) -> bool:
    """Not traced: the compiler of torch 2.11 does not know this question."""
    return torch.amp.is_autocast_available(device)


@constant_in_traces
def has_registers() -> bool:
    """Do compiled kernels run with registers of eight numbers or more? With fewer, torch's convolutions are faster."""
    return _native.extension is not None and _native.extension.isa() != "plain"


@constant_in_traces
def computes_in_bfloat16() -> bool:
    """Do compiled kernels take the processor's dot products of bfloat16, AVX-512's?"""
    return _native.extension is not None and bool(_native.extension.bfloat16_is_active())


@constant_in_traces
def native_devices(qualified_op: str) -> tuple[str, ...]:
    """Device types that the loaded extension registered a kernel of ``qualified_op`` for. Not traced."""
    if _native.extension is None:
        return ()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(key.lower() for key in ("CPU", "CUDA") if has_kernel(qualified_op, key))
