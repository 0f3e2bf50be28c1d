"""The ladder of plane_convolution, and the Conv2d of MSPN's blocks that calls it."""

import pytest
import torch
import torch.nn.functional as F
from codebooks import assert_error_at_most_twice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import vpfast
from vpfast.nn.convolution import Conv2d, is_faster_in_planes
from vpfast.ops import _native
from vpfast.ops._backend import has_registers
from vpfast.ops._plane_convolution import plane_convolution, reference, reference_weight, serves

native = pytest.mark.skipif(_native.extension is None, reason="needs the compiled extension")
OPERATORS = torch.ops.vpfast

# images, inputs, outputs, (H, W), (kh, kw): every kind of block of outputs, bands that end short, registers of two rows
SHAPES = [
    (2, 3, 8, (16, 16), (3, 3)),
    (3, 8, 13, (24, 8), (3, 3)),
    (1, 11, 11, (64, 64), (5, 5)),
    (2, 9, 1, (20, 32), (5, 5)),
    (1, 1, 7, (3, 48), (7, 1)),
    (8, 16, 32, (16, 16), (1, 1)),
    (1, 33, 20, (70, 16), (3, 5)),
    (2, 17, 4, (2, 8), (3, 3)),
]


def maps(shape, dtype=torch.float64, seed=0):
    images, inputs, outputs, size, kernel = shape
    generator = torch.Generator().manual_seed(seed)

    def numbers(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    weight = numbers(outputs, inputs, *kernel) / (inputs * kernel[0] * kernel[1]) ** 0.5
    return numbers(images, inputs, *size), weight, numbers(outputs), numbers(images, outputs, *size)


def both_ways(convolve, gradients, x, weight, bias, grad):
    """y, the gradient of x by the transposed convolution, those of weight and bias."""
    return convolve(x, weight, bias, False), convolve(grad, weight, None, True), *gradients(grad, x, *weight.shape[2:])


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_reference_is_torchs_convolution_with_its_gradients():
    x, weight, bias, grad = maps((2, 3, 4, (8, 8), (3, 5)))
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    y = F.conv2d(x, weight, bias, padding=(1, 2))
    expected = [y, *torch.autograd.grad(y, (x, weight, bias), grad)]
    torch.testing.assert_close(list(both_ways(reference, reference_weight, x, weight, bias, grad)), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(isa, poisoned, shape):
    truth = both_ways(reference, reference_weight, *maps(shape))
    given_ = maps(shape, torch.float32)
    ours = both_ways(OPERATORS.plane_convolution, OPERATORS.plane_convolution_weight, *given_)
    theirs = both_ways(reference, reference_weight, *given_)
    for found, same_precision, exact in zip(ours, theirs, truth, strict=True):
        assert_error_at_most_twice([found], [same_precision], [exact], torch.float32)


@native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(
        st.integers(0, 3),
        st.integers(1, 20),
        st.integers(1, 20),
        st.one_of(
            st.tuples(st.integers(1, 12), st.sampled_from([16, 32, 48])),
            st.tuples(st.sampled_from([2, 4, 10]), st.just(8)),
        ),
        st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    ),
    seed=st.integers(0, 99),
)
def test_any_shape(isa, poisoned, shape, seed):
    given_ = maps(shape, torch.float32, seed)
    found = both_ways(OPERATORS.plane_convolution, OPERATORS.plane_convolution_weight, *given_)
    expected = both_ways(reference, reference_weight, *(t.double() for t in given_))
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_gradients_to_the_second_order(isa):
    x, weight, bias, grad = maps((2, 3, 5, (4, 16), (3, 3)), torch.float32)

    def derivatives(convolve, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = convolve(*leaves)
        first = torch.autograd.grad(y, leaves, grad.to(dtype).square() * y, create_graph=True)
        return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), leaves)]

    expected = derivatives(lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), torch.float64)
    for ours, exact in zip(derivatives(plane_convolution, torch.float32), expected, strict=True):
        assert error(ours, exact) < 1e-5


@native
@pytest.mark.parametrize(
    ("x", "weight", "bias", "said"),
    [
        ((1, 2, 4, 24), (3, 2, 3, 3), None, "W must be a multiple of 16, or 8 with an even H; got H = 4 and W = 24"),
        ((1, 2, 3, 8), (3, 2, 3, 3), None, "W must be a multiple of 16, or 8 with an even H; got H = 3 and W = 8"),
        ((1, 2, 4, 16), (3, 2, 2, 3), None, "kernels must be odd"),
        ((1, 4, 4, 16), (3, 2, 3, 3), None, "x has a wrong shape"),
        ((1, 2, 4, 16), (3, 2, 3, 3), (2,), "bias has a wrong shape"),
        ((2, 4, 16), (3, 2, 3, 3), None, r"maps must be \(B, C, H, W\)"),
        ((1, 0, 4, 16), (3, 0, 3, 3), None, "at least one input"),
    ],
)
def test_refusals(x, weight, bias, said):
    with pytest.raises(RuntimeError, match=said):
        plane_convolution(torch.rand(x), torch.rand(weight), None if bias is None else torch.rand(bias))


# --- where it is taken -----------------------------------------------------------------------------------------------

wide = pytest.mark.skipif(not has_registers(), reason="needs the compiled extension and AVX2")


def called(monkeypatch, convolution, x):
    """Whether the kernel was; its result is torch's."""
    calls = []
    operator = OPERATORS.plane_convolution
    monkeypatch.setattr(OPERATORS, "plane_convolution", lambda *given: calls.append(given) or operator(*given))
    expected = F.conv2d(x, convolution.weight, convolution.bias, padding=convolution.padding)
    torch.testing.assert_close(convolution(x), expected, rtol=1e-4, atol=1e-5)
    return bool(calls)


@wide
def test_few_channels_in_float32_go_by_the_kernel(monkeypatch):
    assert called(monkeypatch, Conv2d(5, 7, 3), torch.rand(2, 5, 16, 32))
    assert called(monkeypatch, Conv2d(5, 7, 1, bias=False), torch.rand(2, 5, 8, 8))


@pytest.mark.parametrize(
    ("convolution", "x"),
    [
        (Conv2d(40, 40, 3), torch.rand(1, 40, 16, 16)),
        (Conv2d(5, 7, 3), torch.rand(1, 5, 16, 20)),
        (Conv2d(5, 7, 3), torch.rand(5, 16, 16)),
        (Conv2d(5, 7, 3).double(), torch.rand(1, 5, 16, 16).double()),
        (Conv2d(5, 7, 3), torch.rand(1, 5, 16, 16).contiguous(memory_format=torch.channels_last)),
        (Conv2d(5, 7, 3).to(memory_format=torch.channels_last), torch.rand(1, 5, 16, 16)),
    ],
    ids=["many channels", "part of a register", "no batch", "float64", "channels_last", "weight in channels_last"],
)
def test_others_go_by_torch(monkeypatch, convolution, x):
    assert not called(monkeypatch, convolution, x)


def test_reference_autocast_and_lower_instruction_sets_go_by_torch(monkeypatch):
    convolution, x = Conv2d(5, 7, 3), torch.rand(1, 5, 16, 16)
    with vpfast.backend("reference"):
        assert not called(monkeypatch, convolution, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(x, convolution.weight)
        assert convolution(x).dtype == torch.bfloat16
    if _native.extension is not None:
        _native.extension.select_isa("plain")
        try:
            assert not called(monkeypatch, convolution, x)
            assert not is_faster_in_planes(convolution, 64, 64)
        finally:
            _native.extension.select_isa("auto")


def test_forward_mode_and_transforms_see_through():
    convolution, x = Conv2d(5, 7, 3), torch.rand(1, 5, 16, 16)
    weight, bias = convolution.weight.detach(), convolution.bias.detach()
    _, tangent = torch.func.jvp(convolution, (x,), (x,))
    torch.testing.assert_close(tangent, F.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-5)
    found = torch.func.grad(lambda x: convolution(x).square().sum())(x)
    expected = torch.func.grad(lambda x: F.conv2d(x, weight, bias, padding=1).square().sum())(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_trace_holds_torchs_convolution():
    convolution, x = Conv2d(5, 7, 3), torch.rand(1, 5, 16, 16)
    graph = torch.export.export(convolution, (x,)).graph_module
    assert "vpfast" not in graph.code
    with FlopCounterMode(display=False) as counter:
        convolution(x)
    assert counter.get_total_flops() == 2 * 5 * 7 * 9 * 16 * 16
    compiled = torch.compile(convolution, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), convolution(x), rtol=1e-4, atol=1e-5)


def test_its_weights_are_those_of_torchs_convolution():
    torch.manual_seed(0)
    ours = Conv2d(5, 7, 3)
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(5, 7, 3, padding=1)
    assert repr(ours) == repr(theirs)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight)


@wide
def test_which_models_are_faster_in_planes():
    from vpfast.models import HRVQVAE, MSPN, MSPNConfig, SHRVQVAEConfig

    assert is_faster_in_planes(MSPN(MSPNConfig.preset("compact")), 64, 64)
    assert not is_faster_in_planes(MSPN(MSPNConfig.preset("compact")), 40, 40)
    assert not is_faster_in_planes(MSPN(MSPNConfig(in_channels=1, channels=(64, 128), levels=1)), 64, 64)
    assert not is_faster_in_planes(HRVQVAE(SHRVQVAEConfig(in_channels=1, channels=(8,))), 64, 64)
    assert not is_faster_in_planes(torch.nn.Linear(2, 2), 64, 64)
