"""Shared by the ladders of all operators."""

import importlib.util

import interpreter
import pytest
import torch

import vpfast
from vpfast.ops import _native


@pytest.fixture(params=["plain", "avx2", "avx512", "amx"])
def isa(request):
    """Each instruction set in turn, where the processor has it; without an extension the reference, once."""
    if _native.extension is None:
        if request.param != "plain":
            pytest.skip("needs the compiled extension")
        yield "reference"
        return
    try:
        _native.extension.select_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _native.extension.select_isa("auto")


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so that an element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """``torch.set_num_threads``, taken back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


if torch.cuda.is_available():
    PLACES = [("native", "cuda"), ("triton", "cuda")]
else:
    PLACES = [("triton", "cpu")]


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(place))
def place(request):
    """Each GPU backend in turn, chosen by ``vpfast.backend``; yields the device to put tensors on.

    Without a GPU that is Triton's interpreter alone: keep tensors to 2^14 elements where the device is a CPU.
    """
    backend, device = request.param
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    if device == "cpu":
        interpreter.mend()
    with vpfast.backend(backend):
        yield device
