"""What lies between MSPN's convolutions: Triton's kernels, in its interpreter or on a GPU, against plain PyTorch."""

import importlib.util

import interpreter
import pytest
import torch
from operators import LAYOUTS, laid_out

import vpfast
from vpfast.ops._fused_maps import leaky_sum_, signed_errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(autouse=True)
def _mended():
    if DEVICE == "cpu":
        interpreter.mend()


def maps(shape, dtype, seed):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(dtype).contiguous(memory_format=torch.channels_last).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (3, 5, 7, 3), (1, 1, 9, 2)])
@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.parametrize("two", [False, True])
def test_sums(dtype, shape, slope, two):
    x, y, bias = maps(shape, dtype, 1), maps(shape, dtype, 2), maps((1, shape[1], 1, 1), dtype, 3).flatten()
    x[0, 0, 0, 0], x[0, 0, 1, 1] = float("nan"), -float("inf")
    total = x.double() + bias.double()[:, None, None] + (y.double() if two else 0)
    wanted = torch.where(total < 0, total * slope if slope else torch.zeros_like(total), total).to(dtype)
    with vpfast.backend("triton"):
        found = leaky_sum_(x, bias, y if two else None, slope)
    assert found is x
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [1, 2])
def test_errors(dtype, channels, factor):
    prediction = maps((2, channels, 4, 6), dtype, 1)
    clip = torch.rand(2, 3, channels, 4 * factor, 6 * factor, generator=torch.Generator().manual_seed(2))
    frame = clip.to(DEVICE, dtype)[:, 1, :, ::factor, ::factor]
    frame[1, 0, 2, 3] = float("nan")
    with vpfast.backend("reference"):
        wanted = signed_errors(prediction, frame)
    with vpfast.backend("triton"):
        found = signed_errors(prediction, frame)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert found.isnan().sum() == 2
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.stride() == wanted.stride()


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, y = (maps((2, 3, 4, 6), torch.float32, seed) for seed in (1, 2))
    torch.library.opcheck(torch.ops.vpfast.signed_errors_triton.default, (x, *laid_out((y,), layout)))
    torch.library.opcheck(torch.ops.vpfast.leaky_sum__triton.default, (x, *laid_out((y[0, :, 0, 0],), layout), y, 0.1))


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bias_of_any_stride(layout):
    x, (bias,) = maps((2, 3, 4, 6), torch.float32, 1), laid_out((torch.randn(3, device=DEVICE),), layout)
    wanted = torch.relu(x + bias[:, None, None])
    with vpfast.backend("triton"):
        torch.testing.assert_close(leaky_sum_(x, bias), wanted)


@needs_triton
def test_vmap():
    predictions, frames = maps((6, 3, 4, 6), torch.float32, 1), maps((2, 3, 4, 6), torch.float32, 2)
    operator, batches = torch.ops.vpfast.signed_errors_triton, predictions.unflatten(0, (3, 2))
    found = torch.func.vmap(operator, (0, None))(batches, frames)
    assert torch.equal(found, torch.stack([operator(batch, frames) for batch in batches]))
    with pytest.raises(RuntimeError, match=r"^vpfast::leaky_sum__triton writes into .* give it the whole batch$"):
        torch.func.vmap(torch.ops.vpfast.leaky_sum__triton, (0, None, None, None))(batches, frames[0, :, 0, 0], None, 0)


@needs_triton
def test_maps_that_are_not_channels_last_are_converted():
    x, bias = torch.randn(2, 3, 4, 5, device=DEVICE), torch.randn(3, device=DEVICE)
    wanted = torch.nn.functional.leaky_relu(x + bias[:, None, None], 0.1)
    with vpfast.backend("triton"):
        torch.testing.assert_close(leaky_sum_(x.clone(), bias, slope=0.1), wanted)


@needs_triton
def test_without_rows_there_is_nothing_to_do():
    with vpfast.backend("triton"):
        assert leaky_sum_(torch.empty(0, 3, 4, 5, device=DEVICE), torch.randn(3, device=DEVICE)).shape == (0, 3, 4, 5)
        empty = torch.empty(0, 3, 4, 5, device=DEVICE)
        assert signed_errors(empty, empty).shape == (0, 6, 4, 5)
