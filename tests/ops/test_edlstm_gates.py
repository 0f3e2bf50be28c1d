"""The ladder of edlstm_gates: formula, accuracy, gradients, what PyTorch expects, layouts, compilation, refusals."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vpfast
from vpfast.ops import _native, edlstm_gates
from vpfast.ops.edlstm_gates import reference

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
# Rows shorter than a vector, equal to one, and not a multiple of one; 0 to 3 trailing dims.
SHAPES = [(3, 8), (2, 20, 17), (2, 12, 7, 9), (1, 64, 16, 16), (2, 4, 3, 5, 7), (5, 4, 1, 1), (1, 4, 1, 33)]
native = pytest.mark.skipif(_native.extension is None, reason="needs the compiled extension")


def inputs(shape, gates_dtype=torch.float32, cell_dtype=None, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    c_prev = torch.randn((shape[0], shape[1] // 4, *shape[2:]), generator=generator, dtype=torch.float64)
    return gates.to(gates_dtype), c_prev.to(cell_dtype or gates_dtype)


def channels_last(t):
    if t.dim() == 4:
        return t.to(memory_format=torch.channels_last)
    return t.to(memory_format=torch.channels_last_3d) if t.dim() == 5 else t


def relative_error(found, exact):
    """Of lists of tensors, taken together: the smallest shapes alone have too few elements to compare two errors by."""
    off = sum(((f.double() - e).square().sum() for f, e in zip(found, exact, strict=True)), torch.zeros(()))
    return (off / sum(e.square().sum() for e in exact)).sqrt().item()


# --- formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["fiog", "ifog", "gofi"])
def test_reference_is_the_paper_equation(order):
    gates, c_prev = inputs((2, 8, 3), torch.float64)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    h, c = reference.edlstm_gates(gates, c_prev, order)
    for b, k, s in itertools.product(range(2), range(2), range(3)):
        f, i, o, g = (gates[b, 2 * order.index(name) + k, s].item() for name in "fiog")
        want_c = sigmoid(f) * c_prev[b, k, s].item() + sigmoid(i) * math.tanh(g)
        assert c[b, k, s].item() == pytest.approx(want_c, rel=1e-14)
        assert h[b, k, s].item() == pytest.approx(sigmoid(o) * math.tanh(want_c), rel=1e-14)


def test_reference_backward_is_the_derivative_of_reference():
    gates, c_prev = (t.requires_grad_() for t in inputs((2, 12, 5), torch.float64))
    outputs = reference.edlstm_gates(gates, c_prev, "gifo")
    grads = [torch.randn_like(t) for t in outputs]
    want = torch.autograd.grad(outputs, (gates, c_prev), grads)
    found = reference.edlstm_gates_backward(*grads, gates.detach(), c_prev.detach(), "gifo")
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-14)


# --- accuracy --------------------------------------------------------------------------------------------------------


def forward_and_backward(functions, gates, c_prev, grad_h, grad_c, order):
    forward, backward = functions
    return (*forward(gates, c_prev, order), *backward(grad_h, grad_c, gates, c_prev, order))


REFERENCE = (reference.edlstm_gates, reference.edlstm_gates_backward)
OPERATOR = (torch.ops.vpfast.edlstm_gates, torch.ops.vpfast.edlstm_gates_backward)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("gates_dtype", "cell_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_at_most_twice_that_of_the_reference(isa, poisoned, shape, gates_dtype, cell_dtype, layout):
    """Against float64, in the same precision. Where that is float64, nothing more exact stands beside the two: there
    they may differ by the rounding of a dozen operations."""
    ours, theirs, exact = [], [], []
    for seed in range(max(1, 4000 // math.prod(shape))):
        gates, c_prev = inputs(shape, gates_dtype, cell_dtype, seed=seed)
        grad_h, grad_c = (t.contiguous() for t in inputs(shape, gates_dtype, cell_dtype, seed=seed + 1000))
        grad_h = grad_h[:, : c_prev.shape[1]]
        given = (gates, c_prev, grad_h, grad_c)
        exact.append(forward_and_backward(REFERENCE, *(t.double() for t in given), "ifog"))
        theirs.append(forward_and_backward(REFERENCE, *given, "ifog"))
        if layout == "channels_last":
            given = tuple(map(channels_last, given))
        ours.append(forward_and_backward(OPERATOR, *given, "ifog"))
    for found, same_precision, truth in zip(*(zip(*runs, strict=True) for runs in (ours, theirs, exact)), strict=True):
        assert found[0].dtype == same_precision[0].dtype
        assert all(torch.isfinite(t).all() for t in found)
        limit = max(2 * relative_error(same_precision, truth), 8 * torch.finfo(torch.float64).eps)
        assert relative_error(found, truth) <= limit


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_large_arguments_keep_relative_accuracy(isa, dtype):
    """tanh near 0, both tails of sigmoid, and beyond: elementwise, where a norm would hide the small ones."""
    x = torch.cat([torch.logspace(-30, 1.9, 400, dtype=torch.float64) * sign for sign in (1, -1)]).to(dtype)
    gates = torch.zeros(1, 4, x.numel(), dtype=dtype)
    for k in range(4):
        gates[0, k] = x if k != 1 else x.flip(0)
    gates.clamp_(-80, 80)
    c_prev = gates[:, 3:].sign()  # of the sign of g, so that their sum does not cancel
    found = edlstm_gates(gates, c_prev)
    exact = reference.edlstm_gates(gates.double(), c_prev.double())
    torch.testing.assert_close(found[0].double(), exact[0], rtol=8 * torch.finfo(dtype).eps, atol=1e-37)
    torch.testing.assert_close(found[1].double(), exact[1], rtol=8 * torch.finfo(dtype).eps, atol=1e-37)
    # An input gate of e^-x leaves g's own relative accuracy visible in c when nothing is remembered.
    forgotten = torch.full_like(c_prev, 0.0)
    c = edlstm_gates(gates, forgotten)[1].double()
    exact_c = reference.edlstm_gates(gates.double(), forgotten.double())[1]
    torch.testing.assert_close(c, exact_c, rtol=8 * torch.finfo(dtype).eps, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_infinite_and_nan_inputs_follow_the_formula(dtype):
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1.0, -200.0, 200.0], dtype=dtype)
    cases = torch.cartesian_prod(special, special, special, special, special)
    gates, c_prev = cases[:, :4].t().reshape(1, 4, -1), cases[:, 4].reshape(1, 1, -1)
    found, want = edlstm_gates(gates, c_prev), reference.edlstm_gates(gates, c_prev)
    # An infinite state times a sigmoid that only underflows is infinite or NaN, by whether it is rounded to 0.
    known = ~torch.isinf(c_prev)
    for ours, theirs in zip(found, want, strict=True):
        close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-30, "equal_nan": True}
        torch.testing.assert_close(ours[known], theirs[known], **close)
    assert not torch.isfinite(found[1][~known]).any()
    grad = torch.ones_like(found[0])
    ours = torch.ops.vpfast.edlstm_gates_backward(grad, None, gates, c_prev, "fiog")
    # A NaN gate reaches every gradient that contains it; elsewhere finite inputs give finite gradients.
    finite = torch.isfinite(cases).all(1)
    assert all(torch.isfinite(g[..., finite]).all() for g in ours)
    nan_output_gate = torch.isnan(gates[0, 2])
    assert torch.isnan(ours[0][0, 2, nan_output_gate]).all()


@native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_isa_agrees(layout):
    gates, c_prev = inputs((2, 28, 9, 11))
    if layout == "channels_last":
        gates, c_prev = channels_last(gates), channels_last(c_prev)
    results = []
    for name in ("plain", "avx2", "avx512"):
        try:
            _native.extension.select_isa(name)
        except ValueError:
            continue
        results.append(edlstm_gates(gates, c_prev))
    _native.extension.select_isa("auto")
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-6)


@native
@pytest.mark.parametrize(("gates_dtype", "cell_dtype"), DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 12, 15, 16])
def test_rows_of_few_channels_give_what_planes_give(isa, channels, gates_dtype, cell_dtype):
    """To the last bit, though some rows are worked on together, and wherever the rows of a slice lie."""
    gates, c_prev = inputs((5, 4 * channels, 9, 13), gates_dtype, cell_dtype)
    given = (gates, c_prev, *(t[:, :channels].contiguous() for t in inputs(gates.shape, gates_dtype, cell_dtype, 1)))
    expected = forward_and_backward(OPERATOR, *(t[::2].contiguous() for t in given), "ifog")
    found = forward_and_backward(OPERATOR, *(channels_last(t)[::2] for t in given), "ifog")
    assert all(map(torch.equal, found, expected))


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout):
    gates, c_prev = inputs((2, 8, 3, 4), torch.float64, scale=1.0)
    if layout == "channels_last":
        gates, c_prev = channels_last(gates), channels_last(c_prev)
    assert torch.autograd.gradcheck(edlstm_gates, (gates.requires_grad_(), c_prev.requires_grad_()))


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(which):
    ours = [t.requires_grad_() for t in inputs((2, 12, 5))]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    edlstm_gates(*ours)[which].sum().backward()  # the sum gives a stride-0 gradient
    reference.edlstm_gates(*theirs)[which].sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_only_one_input_needs_a_gradient():
    gates, c_prev = inputs((2, 8, 3))
    h, _ = edlstm_gates(gates.requires_grad_(), c_prev)
    h.sum().backward()
    assert gates.grad is not None
    assert c_prev.grad is None


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_forward_mode_and_function_transforms(choice):
    gates, c_prev = inputs((2, 8, 3), torch.float64)
    tangents = (torch.randn_like(gates), torch.randn_like(c_prev))
    with vpfast.backend(choice):
        values, found = torch.func.jvp(edlstm_gates, (gates, c_prev), tangents)
        batched = torch.func.vmap(edlstm_gates)(gates[:, None], c_prev[:, None])
        jacobian = torch.func.jacrev(lambda x: edlstm_gates(x, c_prev)[0].sum())(gates)
        with torch.autograd.forward_ad.dual_level():
            dual = [torch.autograd.forward_ad.make_dual(*pair) for pair in zip((gates, c_prev), tangents, strict=True)]
            dual_found = [torch.autograd.forward_ad.unpack_dual(t).tangent for t in edlstm_gates(*dual)]
    _, want = torch.func.jvp(reference.edlstm_gates, (gates, c_prev), tangents)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(tuple(dual_found), want)
    torch.testing.assert_close([t[:, 0] for t in batched], list(values))
    torch.testing.assert_close(
        jacobian, reference.edlstm_gates_backward(torch.ones_like(c_prev), None, gates, c_prev)[0]
    )


@native  # the reference, which serves without it, has second derivatives
def test_second_derivative_is_a_named_error():
    gates, c_prev = inputs((2, 8, 3))
    gates.requires_grad_()
    (first,) = torch.autograd.grad(edlstm_gates(gates, c_prev)[0].sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


# --- what PyTorch expects of an operator -----------------------------------------------------------------------------


def strided_cases():
    gates, c_prev = inputs((4, 24, 6, 5))
    wide = torch.randn(8, 24, 6, 10)
    return {
        "contiguous": (gates, c_prev),
        "channels_last": (channels_last(gates), channels_last(c_prev)),
        "mixed": (channels_last(gates), c_prev),
        "transposed": (gates.transpose(2, 3), c_prev.transpose(2, 3)),
        "batch slice": (wide[::2, :, :, :5].contiguous()[1:3], c_prev[1:3]),
        "sliced": (wide[::2, :, :, ::2], c_prev),
        "expanded": (gates[:1].expand(4, -1, -1, -1), c_prev[:, :1].expand(-1, 6, -1, -1)),
        "time step": (torch.randn(4, 3, 24, 6, 5)[:, 1], torch.randn(4, 3, 6, 6, 5)[:, 2]),
        "unaligned": (torch.randn(4 * 24 * 30 + 1)[1:].view(4, 24, 6, 5), c_prev),
        "empty batch": (gates[:0], c_prev[:0]),
        "empty map": (gates[..., :0], c_prev[..., :0]),
        "volume": tuple(map(channels_last, inputs((2, 8, 3, 4, 5)))),
        "no trailing dims": inputs((3, 8)),
    }


@pytest.mark.parametrize("case", strided_cases())
def test_strides(poisoned, case):
    gates, c_prev = strided_cases()[case]
    found = edlstm_gates(gates, c_prev)
    want = reference.edlstm_gates(gates.contiguous(), c_prev.contiguous())
    torch.testing.assert_close(found, want)
    grad_h, grad_c = torch.randn_like(want[0]), torch.randn_like(want[1]).transpose(0, -1).contiguous().transpose(0, -1)
    grads = torch.ops.vpfast.edlstm_gates_backward(grad_h, grad_c, gates, c_prev, "fiog")
    torch.testing.assert_close(grads, reference.edlstm_gates_backward(grad_h, grad_c, gates, c_prev))


@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    spatial=st.lists(st.integers(0, 9), max_size=3),
    batch=st.integers(0, 4),
    channels=st.integers(1, 9),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # one instruction set for all examples
def test_any_shape_and_stride(isa, data, dtype, spatial, batch, channels):
    dims = 2 + len(spatial)
    order = data.draw(st.permutations("fiog").map("".join))

    def draw(shape, kind):
        """A tensor of ``shape`` whose dims lie in memory in any order, with gaps."""
        perm = data.draw(st.permutations(range(dims)))
        gap = data.draw(st.integers(1, 2))
        stored = torch.randn([shape[p] * gap for p in perm]).to(kind)
        strided = stored[tuple(slice(None, None, gap) for _ in perm)]
        return strided.permute([perm.index(d) for d in range(dims)])

    gates = draw((batch, 4 * channels, *spatial), dtype[0])
    c_prev, *grads = (draw((batch, channels, *spatial), kind) for kind in (dtype[1], dtype[0], dtype[1]))
    found = forward_and_backward(OPERATOR, gates, c_prev, *grads, order)
    want = forward_and_backward(REFERENCE, gates, c_prev, *grads, order)
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == theirs.dtype
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=4 * eps)


@native
def test_element_does_not_depend_on_its_place_in_a_vector():
    """A batch computes what each clip alone would, bit for bit."""
    gates, c_prev = inputs((3, 12, 7, 5))
    whole = edlstm_gates(gates, c_prev)
    for b in range(3):
        alone = edlstm_gates(gates[b : b + 1], c_prev[b : b + 1])
        assert all(torch.equal(w[b : b + 1], a) for w, a in zip(whole, alone, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def cell(gates, c_prev):
        h, c = edlstm_gates(gates * 2, c_prev)
        return h + 1, c

    torch.compiler.reset()
    compiled = torch.compile(cell, fullgraph=True, dynamic=dynamic)
    for size in (4, 6, 9):
        ours = [t.requires_grad_() for t in inputs((2, 8, size, size))]
        theirs = [t.detach().clone().requires_grad_() for t in ours]
        found, want = compiled(*ours), cell(*theirs)
        torch.testing.assert_close(found, want)
        sum(t.sum() for t in found).backward()
        sum(t.sum() for t in want).backward()
        torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


def test_compile_through_backend_choice():
    gates, c_prev = inputs((2, 8, 4))

    @torch.compile(fullgraph=True)
    def cell(gates, c_prev):
        with vpfast.backend("reference"):
            h, _ = edlstm_gates(gates, c_prev)
        return h

    torch.testing.assert_close(cell(gates, c_prev), reference.edlstm_gates(gates, c_prev)[0])
    assert vpfast.current_backend() == "auto"


def test_fake_tensors_have_the_real_layout():
    for gates, c_prev in strided_cases().values():
        real = torch.ops.vpfast.edlstm_gates(gates, c_prev, "fiog")
        with torch._subclasses.FakeTensorMode() as mode:
            fake = torch.ops.vpfast.edlstm_gates(mode.from_tensor(gates), mode.from_tensor(c_prev), "fiog")
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


@pytest.mark.parametrize("gates_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_autocast_keeps_the_cell_in_float32(choice, gates_dtype, cell_dtype):
    gates, c_prev = inputs((2, 8, 4), gates_dtype, cell_dtype)
    gates.requires_grad_()
    with vpfast.backend(choice), torch.autocast("cpu", torch.bfloat16):
        h, c = edlstm_gates(gates, c_prev)
    assert (h.dtype, c.dtype) == (gates_dtype, torch.float32)
    torch.testing.assert_close((h, c), reference.edlstm_gates(gates, c_prev.float()))
    c.sum().backward()
    assert gates.grad.dtype == gates_dtype


# --- backends and refusals -------------------------------------------------------------------------------------------


def test_backend_is_restored_and_checked():
    with vpfast.backend("reference"):
        assert vpfast.current_backend() == "reference"
        with vpfast.backend("auto"):
            assert vpfast.current_backend() == "auto"
        assert vpfast.current_backend() == "reference"
    assert vpfast.current_backend() == "auto"
    kept = vpfast.backend("reference")
    with kept:
        pass
    with kept:
        assert vpfast.current_backend() == "reference"
    vpfast.backend("auto")
    with pytest.raises(ValueError, match="'fast' is unknown"):
        vpfast.backend("fast")


def test_backend_of_the_environment():
    code = "import vpfast; print('imported'); print(vpfast.current_backend())"
    for name, wanted in (("reference", "imported\nreference\n"), ("fast", "imported\n")):
        environment = {**os.environ, "VPFAST_BACKEND": name}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout == wanted
    assert "VPFAST_BACKEND 'fast' is unknown" in done.stderr


def test_reference_backend_is_twice_differentiable():
    gates, c_prev = inputs((1, 4, 2), torch.float64)
    with vpfast.backend("reference"):
        assert torch.autograd.gradgradcheck(edlstm_gates, (gates.requires_grad_(), c_prev.requires_grad_()))


def test_refused_backend_says_why():
    gates, c_prev = inputs((2, 8, 3))
    meta = gates.to("meta"), c_prev.to("meta")
    with vpfast.backend("triton"), pytest.raises(RuntimeError, match=r"triton: Triton .*not "):
        edlstm_gates(*meta)
    with pytest.raises(RuntimeError, match=r"native: .*; triton: "):
        edlstm_gates(*meta)


@pytest.mark.parametrize(
    ("gates", "c_prev", "order", "error", "message"),
    [
        (torch.zeros(2, 8, 3), torch.zeros(2, 2, 3), "fioo", ValueError, "permutation of 'fiog', got 'fioo'"),
        (torch.zeros(2, 7, 3), torch.zeros(2, 2, 3), "fiog", ValueError, r"\(B, 4C, \*\), got \(2, 7, 3\)"),
        (torch.zeros(8), torch.zeros(2), "fiog", ValueError, r"got \(8,\)"),
        (torch.zeros(2, 8, 3), torch.zeros(2, 2, 4), "fiog", ValueError, r"of shape \(2, 2, 3\), got \(2, 2, 4\)"),
        (torch.zeros(2, 8, 3).int(), torch.zeros(2, 2, 3), "fiog", TypeError, "got torch.int32"),
        (torch.zeros(2, 8, 3), torch.zeros(2, 2, 3).double(), "fiog", TypeError, "got torch.float64"),
        (torch.zeros(2, 8, 3).half(), torch.zeros(2, 2, 3).bfloat16(), "fiog", TypeError, "got torch.bfloat16"),
        (torch.zeros(2, 8, 3), torch.zeros(2, 2, 3, device="meta"), "fiog", ValueError, "on cpu and c_prev on meta"),
    ],
)
def test_refusals_name_what_was_given(gates, c_prev, order, error, message):
    with pytest.raises(error, match=message):
        edlstm_gates(gates, c_prev, order)


@native
def test_the_kernel_itself_refuses_what_would_read_beyond_memory():
    gates, c_prev = inputs((2, 8, 3))
    with pytest.raises(RuntimeError, match="dim 2 of gates is 3, of c_prev 4"):
        torch.ops.vpfast.edlstm_gates(gates, torch.zeros(2, 2, 4), "fiog")
    with pytest.raises(RuntimeError, match="permutation"):
        torch.ops.vpfast.edlstm_gates(gates, c_prev, "ffff")
    with pytest.raises(RuntimeError, match="another shape"):
        torch.ops.vpfast.edlstm_gates_backward(torch.zeros(2, 2, 2), None, gates, c_prev, "fiog")


@native
def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="'sse9' is unknown"):
        _native.extension.select_isa("sse9")
