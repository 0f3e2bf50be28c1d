"""Shared by the ladders of all operators."""

import pytest
import torch

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
