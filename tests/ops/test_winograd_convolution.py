"""The ladder of winograd_convolution: of its three operators, of the function that has derivatives, of who serves."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from codebooks import assert_error_at_most_twice
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators import LAYOUTS, laid_out
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import vpfast
from vpfast.ops import _native
from vpfast.ops._backend import has_registers
from vpfast.ops._winograd_convolution import (
    FORWARD,
    LEAST_CHANNELS,
    LEAST_PIXELS,
    PANEL,
    TRANSFORM,
    WEIGHT,
    TransformedWeight,
    convolve,
    is_wide,
    reference,
    reference_weight,
    reference_weights,
    serves,
    winograd_convolution,
)

native = pytest.mark.skipif(_native.extension is None, reason="needs the compiled extension")
OPERATORS = torch.ops.vpfast
REFERENCES = reference_weights, reference, reference_weight
SLOPE = 0.1

# images, inputs, outputs, (H, W): channels that fill registers and panels of 32 or do not, tiles that reach beyond the
# edge, one tile, many blocks of tiles, parts of the sums of a weight's gradient or none, long sums over inputs
SHAPES = [
    (2, 16, 32, (8, 8)),
    (1, 3, 45, (5, 7)),
    (2, 33, 70, (6, 5)),
    (3, 17, 5, (1, 1)),
    (2, 1, 1, (1, 9)),
    (1, 20, 31, (64, 64)),
    (1, 300, 40, (4, 4)),
    (2, 300, 40, (4, 4)),
    (2, 36, 130, (3, 4)),
]


def maps(shape, dtype=torch.float64, seed=0):
    """x, weight, bias, an addend and the gradient of y."""
    images, inputs, outputs, size = shape
    generator = torch.Generator().manual_seed(seed)

    def numbers(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

    x, weight, bias = numbers(images, inputs, *size), numbers(outputs, inputs, 3, 3), numbers(outputs)
    return x, weight / (9 * inputs) ** 0.5, bias, numbers(images, outputs, *size), numbers(images, outputs, *size)


def by(operators, x, weight, bias, added, grad, slope):
    """y, the gradient of x by the convolution with transposed weights, that of weight."""
    transform, convolution, of_weight = operators
    y = convolution(x, transform(weight, False), bias, added, slope, len(weight))
    grad_x = convolution(grad, transform(weight, True), None, None, 1.0, x.shape[1])
    return [y, grad_x, of_weight(grad, x)]


def by_kernels(*problem):
    return by([getattr(OPERATORS, name) for name in (TRANSFORM, FORWARD, WEIGHT)], *problem)


def by_torch(x, weight, bias, added, grad, slope):
    x, weight = (t.detach().requires_grad_() for t in (x, weight))
    sums = F.conv2d(x, weight, bias, padding=1)
    y = F.leaky_relu(sums if added is None else sums + added, slope)
    return [y.detach(), *torch.autograd.grad(sums, (x, weight), grad)]


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 45, (5, 8)), (1, 34, 2, (1, 3))], ids=str)
def test_references_are_torchs_convolution_with_its_gradients(shape):
    x, weight, bias, added, grad = maps(shape)
    for problem in (x, weight, bias, added, grad, SLOPE), (x, weight, None, None, grad, 1.0):
        torch.testing.assert_close(by(REFERENCES, *problem), by_torch(*problem))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transformed_weights(isa, poisoned, shape, transposed):
    weight = maps(shape)[1]
    found, same_precision = (
        each(weight.float(), transposed) for each in (OPERATORS.winograd_weights, reference_weights)
    )
    assert_error_at_most_twice([found], [same_precision], [reference_weights(weight, transposed)], torch.float32)
    outputs = weight.shape[1 if transposed else 0]
    assert (found.movedim(3, 1).flatten(0, 1)[outputs:] == 0).all()
    assert len(found) == -(-outputs // PANEL)


@pytest.mark.parametrize("extras", [True, False], ids=["with bias, addend and slope", "sums alone"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(isa, poisoned, shape, extras):
    def problem(dtype):
        x, weight, bias, added, grad = laid_out(maps(shape, dtype), "channels_last")
        return (x, weight, bias, added, grad, SLOPE) if extras else (x, weight, None, None, grad, 1.0)

    ours, theirs = (convolve(*problem(torch.float32)) for convolve in (by_kernels, by_torch))
    for found, same_precision, exact in zip(ours, theirs, by_torch(*problem(torch.float64)), strict=True):
        assert_error_at_most_twice([found], [same_precision], [exact], torch.float32)


@native
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*map(st.integers, (0, 1, 1), (3, 70, 70)), st.tuples(st.integers(1, 13), st.integers(1, 13))),
    of_maps=st.sampled_from(sorted(LAYOUTS)),
    of_weight=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 99),
)
def test_any_shape_in_any_layout(isa, poisoned, shape, of_maps, of_weight, seed):
    x, weight, bias, added, grad = maps(shape, torch.float32, seed)
    x, added, grad = map(LAYOUTS[of_maps], (x, added, grad))
    given_ = x, LAYOUTS[of_weight](weight), bias, added, grad
    expected = by_torch(*(t.double() for t in given_), SLOPE)
    for ours, exact in zip(by_kernels(*given_, SLOPE), expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
        assert ours.is_contiguous(memory_format=torch.channels_last)


@native
@pytest.mark.parametrize(("images", "size"), [(0, (4, 5)), (2, (0, 5)), (2, (4, 0))], ids=str)
def test_maps_of_no_pixels(isa, poisoned, images, size):
    y, grad_x, grad_weight = by_kernels(*maps((images, 17, 40, size), torch.float32), SLOPE)
    assert (y.shape, grad_x.shape) == ((images, 40, *size), (images, 17, *size))
    assert torch.equal(grad_weight, torch.zeros(40, 17, 3, 3))


@native
@pytest.mark.parametrize("row", [0, 1, 4])
def test_infinity_reaches_its_neighbours_alone(isa, row):
    x, weight, _, _, grad = maps((2, 5, 7, (5, 6)), torch.float32)
    x[1, 2, row, 3] = torch.inf
    found, expected = (each(x, weight, None, None, grad, 1.0)[0] for each in (by_kernels, by_torch))
    assert torch.equal(found.isfinite(), expected.isfinite())


@native
@pytest.mark.parametrize(
    "shape", [(2, 40, 30, (20, 20)), (1, 33, 300, (4, 4))], ids=["blocks and parts of tiles", "panels of outputs"]
)
def test_no_result_depends_on_the_number_of_threads(isa, threads, shape):
    given_ = *maps(shape, torch.float32), SLOPE
    threads(1)
    expected = by_kernels(*given_)
    for count in (2, 3):
        threads(count)
        assert all(map(torch.equal, by_kernels(*given_), expected)), f"{count} threads"


MAPS, WEIGHTS, SUMS = torch.rand(1, 5, 4, 4), torch.rand(1, 16, 5, PANEL), (None, None, 1.0)
NOTHING, FLOAT32 = "needs at least one input and one output channel", "has a wrong shape, or is not float32"


@native
@pytest.mark.parametrize(
    ("operator", "arguments", "said"),
    [
        (TRANSFORM, (torch.rand(6, 5, 9), False), r"weights: weight must be \(outputs, inputs, 3, 3\)"),
        (TRANSFORM, (torch.rand(6, 5, 3, 5), False), r"weight must be float32 \(outputs, inputs, 3, 3\)"),
        (TRANSFORM, (torch.rand(6, 5, 3, 3).double(), True), r"weight must be float32 \(outputs, inputs, 3, 3\)"),
        (FORWARD, (MAPS[0], WEIGHTS, *SUMS, 6), r"maps must be \(B, C, H, W\)"),
        (FORWARD, (MAPS, WEIGHTS, *SUMS, 0), NOTHING),
        (FORWARD, (MAPS[:, :0], WEIGHTS[:, :, :0], *SUMS, 6), NOTHING),
        (FORWARD, (MAPS.double(), WEIGHTS, *SUMS, 6), f"x {FLOAT32}"),
        (FORWARD, (MAPS, WEIGHTS.double(), *SUMS, 6), f"weights {FLOAT32}"),
        (FORWARD, (MAPS[:, 1:], WEIGHTS, *SUMS, 6), f"weights {FLOAT32}"),
        (FORWARD, (MAPS, WEIGHTS, *SUMS, 33), f"weights {FLOAT32}"),
        (FORWARD, (MAPS, WEIGHTS, torch.rand(5), None, 1.0, 6), f"bias {FLOAT32}"),
        (FORWARD, (MAPS, WEIGHTS, torch.rand(6).bfloat16(), None, 1.0, 6), f"bias {FLOAT32}"),
        (FORWARD, (MAPS, WEIGHTS, None, MAPS, 1.0, 6), f"added {FLOAT32}"),
        (FORWARD, (MAPS, WEIGHTS, None, MAPS[0], 1.0, 5), r"added must be \(B, C, H, W\)"),
        (WEIGHT, (MAPS[0], MAPS), r"grad must be \(B, C, H, W\)"),
        (WEIGHT, (MAPS, MAPS[0]), r"maps must be \(B, C, H, W\)"),
        (WEIGHT, (MAPS[..., 1:], MAPS), f"grad {FLOAT32}"),
        (WEIGHT, (MAPS.double(), MAPS), f"grad {FLOAT32}"),
        (WEIGHT, (MAPS, MAPS.double()), f"x {FLOAT32}"),
        (WEIGHT, (MAPS[:, :0], MAPS), NOTHING),
    ],
)
def test_refusals(operator, arguments, said):
    with pytest.raises(RuntimeError, match=said):
        getattr(OPERATORS, operator)(*arguments)


# --- the function -----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The names of the operators, as they are called."""
    names = []

    def listen(name, operator):
        monkeypatch.setattr(OPERATORS, name, lambda *given: names.append(name) or operator(*given))

    for name in (TRANSFORM, FORWARD, WEIGHT):
        listen(name, getattr(OPERATORS, name))
    return names


def test_convolve_is_torchs_with_what_follows(isa):
    x, weight, bias, added, _ = maps((2, 17, 40, (5, 6)), torch.float32)
    found = convolve(x, TransformedWeight(weight)(), bias, len(weight), added, SLOPE)
    expected = F.leaky_relu(F.conv2d(x, weight, bias, padding=1) + added, SLOPE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", product([False, True], [False, True], [None, False, True]), ids=str)
def test_gradients_of_the_leaves_that_need_one(isa, calls, needs):
    x, weight, bias, _, grad = maps((2, 17, 40, (5, 6)), torch.float32)
    given_ = x, weight, None if needs[2] is None else bias
    leaves = [None if t is None else t.requires_grad_(bool(need)) for t, need in zip(given_, needs, strict=True)]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    y, expected = winograd_convolution(*leaves), F.conv2d(*exact, padding=1)
    assert error(y, expected) < 1e-5
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(grad)
        expected.backward(grad.double())
    for leaf, same, need in zip(leaves, exact, needs, strict=True):
        if need:
            assert error(leaf.grad, same.grad) < 1e-5
        else:
            assert leaf is None or leaf.grad is None
    assert calls == [TRANSFORM, FORWARD] * (1 + needs[0]) + [WEIGHT] * needs[1]


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_to_the_second_order(isa, with_bias):
    x, weight, bias, _, grad = maps((2, 5, 35, (4, 5)), torch.float32)

    def derivatives(convolve, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in ((x, weight, bias) if with_bias else (x, weight))]
        y = convolve(*leaves, *[None] * (3 - len(leaves)))
        first = torch.autograd.grad(y, leaves, grad.to(dtype).square() * y, create_graph=True)
        return [*first, *torch.autograd.grad(sum(each.square().sum() for each in first), leaves)]

    expected = derivatives(lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1), torch.float64)
    for ours, exact in zip(derivatives(winograd_convolution, torch.float32), expected, strict=True):
        assert error(ours, exact) < 1e-5


def test_shared_weights_are_transformed_once_for_each_direction(calls):
    x, weight, bias, _, grad = maps((2, 17, 17, (5, 6)), torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def derivatives(transformed=None):
        y = winograd_convolution(winograd_convolution(*leaves, transformed), weight, bias, transformed)
        return torch.autograd.grad(y, leaves, grad)

    expected, shared = derivatives(), TransformedWeight(weight)
    assert calls.count(TRANSFORM) == 4
    for transforms in (6, 8):  # one each way, which the backward pass forgets
        assert all(map(torch.equal, derivatives(shared), expected))
        assert calls.count(TRANSFORM) == transforms


def test_weights_written_before_their_gradient_are_an_error():
    x, weight, _, _, grad = maps((1, 4, 4, (4, 4)), torch.float32)
    y = winograd_convolution(x.requires_grad_(), weight, None)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


# --- where it is taken ------------------------------------------------------------------------------------------------

wide = pytest.mark.skipif(not has_registers(), reason="needs the compiled extension and AVX2")


def pair(images=1, inputs=LEAST_CHANNELS, outputs=LEAST_CHANNELS, size=(2, LEAST_PIXELS // 2), kernel=3):
    """x in channels_last and a weight: as small as is served."""
    x = torch.rand(images, inputs, *size).contiguous(memory_format=torch.channels_last)
    return x, torch.rand(outputs, inputs, kernel, kernel)


PAIR = pair()
PLANES = PAIR[0].contiguous()


@wide
def test_serves_wide_maps_in_channels_last():
    assert serves(*PAIR)
    assert serves(*pair(3, 300, 70))
    assert serves(*pair(LEAST_PIXELS, size=(1, 1)))
    x, weight = pair()
    assert serves(x.requires_grad_(), weight.contiguous(memory_format=torch.channels_last))


def test_serves_with_registers_of_eight_numbers(isa):
    assert has_registers() == serves(*PAIR) == (isa not in ("plain", "reference"))


OTHERS = {
    "few inputs": pair(inputs=LEAST_CHANNELS - 1),
    "few outputs": pair(outputs=LEAST_CHANNELS - 1),
    "few pixels": pair(size=(1, LEAST_PIXELS - 1)),
    "no images": pair(images=0),
    "1x1": pair(kernel=1),
    "5x5": pair(kernel=5),
    "planes": (PLANES, PAIR[1]),
    "no batch": (PLANES[0], PAIR[1]),
    "float64": (PAIR[0].double(), PAIR[1].double()),
    "weight in float64": (PAIR[0], PAIR[1].double()),
    "bfloat16": (PAIR[0].bfloat16(), PAIR[1].bfloat16()),
    "meta": (PAIR[0].to("meta"), PAIR[1].to("meta")),
}


@pytest.mark.parametrize("other", OTHERS)
def test_serves_no_others(other):
    assert not serves(*OTHERS[other])


def test_is_wide():
    least = LEAST_CHANNELS
    assert is_wide(torch.empty(least, least, 3, 3))
    others = (least - 1, least, 3, 3), (least, least - 1, 3, 3), (least, least, 3, 1), (least, least)
    assert not any(is_wide(torch.empty(shape)) for shape in others)


WITHIN = {
    "reference": lambda: vpfast.backend("reference"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "operators counted": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("context", WITHIN)
def test_serves_nobody_within(context):
    with WITHIN[context]():
        assert not serves(*PAIR)
    assert serves(*PAIR) == has_registers()


@pytest.mark.parametrize("transformed", [0, 1], ids=["x", "weight"])
def test_serves_no_transforms(transformed):
    seen, t = [], PAIR[transformed]

    def look(t):
        seen.append(serves(*(t if k == transformed else given_ for k, given_ in enumerate(PAIR))))
        return t.sum()

    torch.func.grad(look)(t)
    torch.func.jvp(look, (t,), (t,))
    with forward_ad.dual_level():
        look(forward_ad.make_dual(t, t))
    torch.func.vmap(look)(torch.stack([t, t]))
    assert seen == [False] * 4


def test_serves_no_compiler():
    compiled = torch.compile(lambda x, weight: x + serves(x, weight), backend="eager", fullgraph=True)
    assert torch.equal(compiled(*PAIR), PAIR[0])
