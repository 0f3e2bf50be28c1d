"""What a GPU can run: its compute capability, beside the architectures that the kernels were compiled for."""

from functools import cache

import torch

from vpfast.ops import _native
from vpfast.ops._tracing import constant_in_traces

Capability = tuple[int, int]

TRITON_NEEDS: Capability = (8, 0)


@cache
def built_for() -> tuple[str, ...]:
    """The architectures of the loaded extension, as TORCH_CUDA_ARCH_LIST has them; none where it has no CUDA."""
    if _native.extension is None:
        return ()
    return tuple(filter(None, _native.extension.build_info()["cuda_architectures"].split(";")))


def runs_on(architecture: str, capability: Capability) -> bool:
    """Does code compiled for ``architecture``, such as "8.0", "9.0a" or "12.0+PTX", run on such a GPU?

    Machine code runs on its own major version, from its minor version on; with an "a" on its very version alone. PTX is
    compiled by the driver for any later version; with an "f" for later ones of the family, which is the major version.
    """
    number, ptx = architecture.removesuffix("+PTX"), architecture.endswith("+PTX")
    major, minor = map(int, number.rstrip("af").split("."))
    if number.endswith("a"):
        return capability == (major, minor)
    if ptx and not number.endswith("f"):
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


def capability(index: int | None) -> Capability | None:
    """Compute capability of CUDA device ``index``, or of the current one; None where torch sees no GPU."""
    if index is None and torch.cuda.is_available():
        index = torch.cuda.current_device()
    return _capability(index)


@cache
def _capability(index: int | None) -> Capability | None:
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@cache
def cuda_versions() -> tuple[str, str]:
    """The CUDA that the loaded extension was compiled with, and the latest that the driver knows, such as "13.0"."""
    assert _native.extension is not None
    return _native.extension.build_info()["cuda"], _native.extension.cuda_of_driver()


def driver_serves() -> bool:
    """Does the driver run what was compiled with that CUDA? One of the same major version does, or a later one."""
    compiled, known = (int(version.split(".")[0]) for version in cuda_versions())
    return known >= compiled


@constant_in_traces
def runs_native(index: int | None) -> bool:
    """Does the extension hold code for that GPU, and a driver run it? Not traced: a compiled graph is for the GPU that
    it was traced on."""
    return capability(index) is None or (holds_code_for(index) and driver_serves())


def holds_code_for(index: int | None) -> bool:
    """Does the extension hold code for that GPU, whatever the driver?"""
    found = capability(index)
    return found is not None and _any_runs_on(built_for(), found)


@constant_in_traces
def runs_triton(index: int | None) -> bool:
    """Can Triton compile for that GPU? Not traced either."""
    found = capability(index)
    return found is None or found >= TRITON_NEEDS


@cache
def _any_runs_on(architectures: tuple[str, ...], found: Capability) -> bool:
    return any(runs_on(architecture, found) for architecture in architectures)


def described(index: int | None) -> str:
    """That GPU in words, for a refusal: its name and compute capability."""
    found = capability(index)
    if found is None:
        return "a GPU that is not here"
    return f"{torch.cuda.get_device_name(index)} has compute capability {found[0]}.{found[1]}"
