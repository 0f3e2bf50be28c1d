"""Shared by the ladders of all operators."""

import pytest
import torch

from vpfast.ops import _native


@pytest.fixture(params=["plain", "avx2", "avx512"])
def isa(request):
    """Each instruction set in turn; those that this processor lacks are skipped and say so."""
    if _native.extension is None:
        pytest.skip("needs the compiled extension")
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
