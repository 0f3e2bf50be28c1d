"""The ladder of edlstm_gates on a GPU, once for each backend; without one, of Triton's kernels in its interpreter."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vpfast
from vpfast.ops import edlstm_gates
from vpfast.ops._library import operator
from vpfast.ops.edlstm_gates import reference

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
# Rows of whole accesses and not, shorter than one, longer than a block; 0 to 3 trailing dims.
SHAPES = [(33, 24), (2, 20, 17), (2, 32, 7, 9), (1, 64, 12, 16), (2, 32, 3, 5, 2), (25, 32, 1, 1), (1, 4, 1, 293)]
LAYOUTS = [(shape, "contiguous") for shape in SHAPES] + [(s, "channels_last") for s in SHAPES if len(s) > 3]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def inputs(place, shape, gates_dtype=torch.float32, cell_dtype=None, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    c_prev = torch.randn((shape[0], shape[1] // 4, *shape[2:]), generator=generator, dtype=torch.float64)
    return gates.to(place, gates_dtype), c_prev.to(place, cell_dtype or gates_dtype)


def channels_last(t):
    if t.dim() == 4:
        return t.to(memory_format=torch.channels_last)
    return t.to(memory_format=torch.channels_last_3d) if t.dim() == 5 else t


def kernels():
    """(forward, backward) of the backend that is chosen."""
    backend = vpfast.current_backend()
    return operator("edlstm_gates", backend), operator("edlstm_gates_backward", backend)


def forward_and_backward(functions, gates, c_prev, grad_h, grad_c, order):
    forward, backward = functions
    return (*forward(gates, c_prev, order), *backward(grad_h, grad_c, gates, c_prev, order))


REFERENCE = (reference.edlstm_gates, reference.edlstm_gates_backward)


def relative_error(found, exact):
    """Of lists of tensors, taken together: the smallest shapes alone have too few elements to compare two errors by."""
    off = sum(((f.double() - e).square().sum() for f, e in zip(found, exact, strict=True)), torch.zeros(()))
    return (off / sum(e.square().sum() for e in exact)).sqrt().item()


def same_bits(found, want):
    return all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gates_dtype", "cell_dtype"), DTYPES)
@pytest.mark.parametrize(("shape", "layout"), LAYOUTS)
def test_error_is_at_most_twice_that_of_the_reference(place, poisoned, shape, gates_dtype, cell_dtype, layout):
    """Against float64, in the same precision. Where that is float64, nothing more exact stands beside the two: there
    they may differ by the rounding of a dozen operations."""
    ours, theirs, exact = [], [], []
    for seed in range((8000 if place == "cuda" else 600) * 4 // math.prod(shape) + 1):
        gates, c_prev = inputs(place, shape, gates_dtype, cell_dtype, seed=seed)
        grad_h, grad_c = inputs(place, shape, gates_dtype, cell_dtype, seed=seed + 1000)
        given = (gates, c_prev, grad_h[:, : c_prev.shape[1]].contiguous(), grad_c)
        exact.append(forward_and_backward(REFERENCE, *(t.double() for t in given), "ifog"))
        theirs.append(forward_and_backward(REFERENCE, *given, "ifog"))
        if layout == "channels_last":
            given = tuple(map(channels_last, given))
        ours.append(forward_and_backward(kernels(), *given, "ifog"))
    for found, same_precision, truth in zip(*(zip(*runs, strict=True) for runs in (ours, theirs, exact)), strict=True):
        assert found[0].dtype == same_precision[0].dtype
        assert all(torch.isfinite(t).all() for t in found)
        limit = max(2 * relative_error(same_precision, truth), 8 * torch.finfo(torch.float64).eps)
        assert relative_error(found, truth) <= limit


@pytest.mark.parametrize("scale", [1e-3, 30.0])
@pytest.mark.parametrize(("gates_dtype", "cell_dtype"), DTYPES)
def test_small_and_saturated_gates(place, gates_dtype, cell_dtype, scale):
    gates, c_prev = inputs(place, (2, 64, 8, 8), gates_dtype, cell_dtype, scale)
    c_prev = c_prev * min(scale, 1.0)
    grad_h, grad_c = torch.randn_like(c_prev).to(gates_dtype), torch.randn_like(c_prev)
    given = (gates, c_prev, grad_h, grad_c)
    exact = forward_and_backward(REFERENCE, *(t.double() for t in given), "fiog")
    theirs = forward_and_backward(REFERENCE, *given, "fiog")
    for found, same_precision, truth in zip(
        forward_and_backward(kernels(), *given, "fiog"), theirs, exact, strict=True
    ):
        limit = max(2 * relative_error([same_precision], [truth]), 8 * torch.finfo(torch.float64).eps)
        assert relative_error([found], [truth]) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_large_arguments_keep_relative_accuracy(place, dtype):
    """tanh near 0, both tails of sigmoid, and beyond: elementwise, where a norm would hide the small ones."""
    x = torch.cat([torch.logspace(-30, 1.9, 400, dtype=torch.float64) * sign for sign in (1, -1)]).to(place, dtype)
    gates = torch.stack([x, x.flip(0), x, x])[None].clamp(-80, 80)
    c_prev = gates[:, 3:].sign()  # of the sign of g, so that their sum does not cancel
    for cell in (c_prev, torch.zeros_like(c_prev)):
        exact = reference.edlstm_gates(gates.double(), cell.double())
        for found, want in zip(edlstm_gates(gates, cell), exact, strict=True):
            torch.testing.assert_close(found.double(), want, rtol=8 * torch.finfo(dtype).eps, atol=1e-37)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy's, in the interpreter
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_infinite_and_nan_inputs_follow_the_formula(place, dtype):
    special = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1.0, -200.0, 200.0], dtype=dtype)
    cases = torch.cartesian_prod(*[special] * 5).to(place)
    if place == "cpu":
        cases = cases[::11]  # every value in every place still
    gates, c_prev = cases[:, :4].t().reshape(1, 4, -1), cases[:, 4].reshape(1, 1, -1)
    found, want = edlstm_gates(gates, c_prev), reference.edlstm_gates(gates, c_prev)
    # An infinite state times a sigmoid that only underflows is infinite or NaN, by whether it is rounded to 0.
    known = ~torch.isinf(c_prev)
    for ours, theirs in zip(found, want, strict=True):
        close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-30, "equal_nan": True}
        torch.testing.assert_close(ours[known], theirs[known], **close)
    assert not torch.isfinite(found[1][~known]).any()
    ours = kernels()[1](torch.ones_like(found[0]), None, gates, c_prev, "fiog")
    finite = torch.isfinite(cases).all(1)
    assert all(torch.isfinite(g[..., finite]).all() for g in ours)
    assert torch.isnan(ours[0][0, 2, torch.isnan(gates[0, 2])]).all()


# --- layouts ---------------------------------------------------------------------------------------------------------


def strided_cases(place):
    gates, c_prev = inputs(place, (4, 24, 6, 5))
    wide = inputs(place, (8, 24, 6, 10))[0]
    clip, states = (inputs(place, (4, 3 * channels, 6, 5))[0] for channels in (24, 6))
    odd = inputs(place, (4 * 24 * 30 + 1, 4))[0][:, 0].contiguous()
    return {
        "contiguous": (gates, c_prev),
        "channels_last": (channels_last(gates), channels_last(c_prev)),
        "mixed": (channels_last(gates), c_prev),
        "transposed": (gates.transpose(2, 3), c_prev.transpose(2, 3)),
        "batch slice": (gates[1:3], c_prev[1:3]),
        "sliced": (wide[::2, :, :, ::2], c_prev),
        "expanded": (gates[:1].expand(4, -1, -1, -1), c_prev[:, :1].expand(-1, 6, -1, -1)),
        "one state for a batch": (gates, c_prev[:1].expand(4, -1, -1, -1)),
        "time step": (clip.view(4, 3, 24, 6, 5)[:, 1], states.view(4, 3, 6, 6, 5)[:, 2]),
        "unaligned": (odd[1:].view(4, 24, 6, 5), c_prev),
        "empty batch": (gates[:0], c_prev[:0]),
        "empty map": (gates[..., :0], c_prev[..., :0]),
        "volume": tuple(map(channels_last, inputs(place, (2, 8, 3, 4, 5)))),
        "no trailing dims": inputs(place, (3, 8)),
    }


CASES = list(strided_cases("cpu"))


@pytest.mark.parametrize("case", CASES)
def test_strides(place, poisoned, case):
    gates, c_prev = strided_cases(place)[case]
    found = edlstm_gates(gates, c_prev)
    want = reference.edlstm_gates(gates.contiguous(), c_prev.contiguous())
    torch.testing.assert_close(found, want)
    grad_h, grad_c = torch.randn_like(want[0]), torch.randn_like(want[1]).transpose(0, -1).contiguous().transpose(0, -1)
    for grads in ((grad_h, grad_c), (None, grad_c), (grad_h, None)):
        found = kernels()[1](*grads, gates, c_prev, "fiog")
        torch.testing.assert_close(found, reference.edlstm_gates_backward(*grads, gates, c_prev))


@pytest.mark.parametrize("case", CASES)
def test_fake_tensors_have_the_real_layout(place, case):
    gates, c_prev = strided_cases(place)[case]
    real = kernels()[0](gates, c_prev, "fiog")
    real_grads = kernels()[1](c_prev, None, gates, c_prev, "fiog")
    with torch._subclasses.FakeTensorMode() as mode:
        fake_inputs = mode.from_tensor(gates), mode.from_tensor(c_prev)
        fake = kernels()[0](*fake_inputs, "fiog")
        fake_grads = kernels()[1](fake_inputs[1], None, *fake_inputs, "fiog")
    for r, f in zip((*real, *real_grads), (*fake, *fake_grads), strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


@pytest.mark.parametrize("case", ["contiguous", "channels_last", "time step", "sliced", "expanded", "empty map"])
def test_opcheck(place, case):
    gates, c_prev = strided_cases(place)[case]
    forward, backward = kernels()
    torch.library.opcheck(forward.default, (gates.detach().requires_grad_(), c_prev.detach().requires_grad_(), "fiog"))
    grads = (torch.randn_like(c_prev), torch.randn_like(c_prev))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward.default, (*grads, gates, c_prev, "fiog"), test_utils=tests)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    max_examples=25 if torch.cuda.is_available() else 30,
)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    spatial=st.lists(st.integers(0, 9), max_size=3),
    batch=st.integers(0, 4),
    channels=st.integers(1, 9),
)
def test_any_shape_and_stride(place, data, dtype, spatial, batch, channels):
    dims = 2 + len(spatial)
    order = data.draw(st.permutations("fiog").map("".join))

    def draw(shape, kind):
        """A tensor of ``shape`` whose dims lie in memory in any order, with gaps."""
        perm = data.draw(st.permutations(range(dims)))
        gap = data.draw(st.integers(1, 2))
        stored = torch.randn([shape[p] * gap for p in perm]).to(place, kind)
        strided = stored[tuple(slice(None, None, gap) for _ in perm)]
        return strided.permute([perm.index(d) for d in range(dims)])

    gates = draw((batch, 4 * channels, *spatial), dtype[0])
    c_prev = draw((batch, channels, *spatial), dtype[1])
    for ours, theirs in zip(
        edlstm_gates(gates, c_prev, order), reference.edlstm_gates(gates, c_prev, order), strict=True
    ):
        assert ours.dtype == theirs.dtype
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=4 * eps)


def test_more_items_than_32_bits_count(place, monkeypatch):
    """Triton's kernels then divide 64-bit numbers, which no tensor of a test is large enough for."""
    if vpfast.current_backend() != "triton":
        pytest.skip("compiled kernels have one division for all sizes")
    gates, c_prev = inputs(place, (3, 20, 7))
    narrow = forward_and_backward(kernels(), gates, c_prev, c_prev, None, "fiog")
    monkeypatch.setattr("vpfast.kernels.edlstm_gates.NARROW", 0)
    assert same_bits(forward_and_backward(kernels(), gates, c_prev, c_prev, None, "fiog"), narrow)


def test_every_order_of_gates(place):
    gates, c_prev = inputs(place, (2, 16, 3))
    for order in map("".join, itertools.permutations("fiog")):
        torch.testing.assert_close(edlstm_gates(gates, c_prev, order), reference.edlstm_gates(gates, c_prev, order))


# --- gradients and repeatability -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(place, layout):
    gates, c_prev = inputs(place, (2, 8, 2, 3), torch.float64, scale=1.0)
    if layout == "channels_last":
        gates, c_prev = channels_last(gates), channels_last(c_prev)
    assert torch.autograd.gradcheck(edlstm_gates, (gates.requires_grad_(), c_prev.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(place, which):
    ours = [t.requires_grad_() for t in inputs(place, (2, 12, 5))]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    edlstm_gates(*ours)[which].sum().backward()  # the sum gives a stride-0 gradient
    reference.edlstm_gates(*theirs)[which].sum().backward()
    torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


def test_second_derivative_is_a_named_error(place):
    gates, c_prev = inputs(place, (2, 8, 3))
    gates.requires_grad_()
    (first,) = torch.autograd.grad(edlstm_gates(gates, c_prev)[0].sum(), gates, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()


@pytest.mark.parametrize(("gates_dtype", "cell_dtype"), DTYPES)
def test_an_element_does_not_depend_on_its_place(place, gates_dtype, cell_dtype):
    """A batch computes what each clip alone would, bit for bit, also where rows are not aligned, and every time."""
    gates, c_prev = inputs(place, (3, 32, 7, 5), gates_dtype, cell_dtype)
    given = (gates, c_prev, gates[:, :8].contiguous(), c_prev)
    whole = forward_and_backward(kernels(), *given, "fiog")
    assert same_bits(forward_and_backward(kernels(), *given, "fiog"), whole)
    for b in range(3):
        moved = []
        for t in given:
            alone = t.new_empty(t[b].numel() + 1)[1:].view(1, *t.shape[1:])
            moved.append(alone.copy_(t[b : b + 1]))
        found = forward_and_backward(kernels(), *moved, "fiog")
        assert same_bits(found, [w[b : b + 1] for w in whole])


def test_autocast_keeps_the_cell_in_float32(place):
    gates, c_prev = inputs(place, (2, 8, 4), torch.bfloat16)
    gates.requires_grad_()
    with torch.autocast(place, torch.bfloat16):
        h, c = edlstm_gates(gates, c_prev)
    assert (h.dtype, c.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close((h, c), reference.edlstm_gates(gates, c_prev.float()))
    c.sum().backward()
    assert gates.grad.dtype == torch.bfloat16


# --- what only a GPU has ---------------------------------------------------------------------------------------------


@needs_gpu
def test_backends_agree():
    """Native, Triton and reference on the same inputs, and a switch between them in the middle changes nothing more."""
    gates, c_prev = inputs("cuda", (4, 64, 33, 31))
    results = {}
    for backend in ("native", "triton", "reference"):
        with vpfast.backend(backend):
            results[backend] = edlstm_gates(gates, c_prev)
    for backend in ("native", "triton"):
        torch.testing.assert_close(results[backend], results["reference"], rtol=1e-6, atol=1e-6)


@needs_gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(place, dynamic):
    def cell(gates, c_prev):
        h, c = edlstm_gates(gates * 2, c_prev)
        return h + 1, c

    torch.compiler.reset()
    compiled = torch.compile(cell, fullgraph=True, dynamic=dynamic)
    for size in (4, 6, 9):
        ours = [t.requires_grad_() for t in inputs(place, (2, 8, size, size))]
        theirs = [t.detach().clone().requires_grad_() for t in ours]
        found, want = compiled(*ours), cell(*theirs)
        torch.testing.assert_close(found, want)
        sum(t.sum() for t in found).backward()
        sum(t.sum() for t in want).backward()
        torch.testing.assert_close([t.grad for t in ours], [t.grad for t in theirs])


@needs_gpu
def test_cuda_graph(place):
    """Captured once, replayed on other inputs: no synchronization, no allocation of its own."""
    gates, c_prev = inputs(place, (2, 64, 16, 16))
    given = [gates, c_prev, torch.randn_like(c_prev), torch.randn_like(c_prev)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_and_backward(kernels(), *given, "fiog")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(kernels(), *given, "fiog")
    for seed in (1, 2):
        for t, fresh in zip(given, inputs(place, (2, 64, 16, 16), seed=seed), strict=False):
            t.copy_(fresh)
        graph.replay()
        assert same_bits(captured, forward_and_backward(kernels(), *given, "fiog"))


@needs_gpu
def test_work_is_queued_on_the_current_stream(place):
    """What is computed on another stream just before must be seen, with nothing else to order the two."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        gates, c_prev = inputs(place, (8, 256, 64, 64))
        torch.cuda._sleep(20_000_000)
        gates.mul_(0.5)
        found = edlstm_gates(gates, c_prev)
        want = reference.edlstm_gates(gates, c_prev)
    side.synchronize()
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_tensors_of_another_device_than_the_current_one(place):
    gates, c_prev = inputs("cuda:1", (2, 64, 9, 9))
    found = edlstm_gates(gates, c_prev)
    assert found[0].device == gates.device
    torch.testing.assert_close(found, reference.edlstm_gates(gates, c_prev))


@needs_gpu
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_two_to_the_31_elements(place, layout):
    """Only the ends are looked at, the last of which no 32-bit index reaches."""
    shape = (17, 4 * 512, 256, 256)  # 2.3e9 gates
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 28 * 2**30:
        pytest.skip("needs 28 GiB of free GPU memory")
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    gates = torch.empty(shape, dtype=torch.bfloat16, device=place, memory_format=format)
    c_prev = torch.empty((17, 512, 256, 256), dtype=torch.bfloat16, device=place, memory_format=format)
    for t in (gates, c_prev):
        t[0].normal_()
        t[-1].normal_()
    forward, backward = kernels()
    h, c = forward(gates, c_prev, "fiog")
    grads = backward(h, c, gates, c_prev, "fiog")
    for end in (slice(0, 1), slice(16, 17)):
        want = reference.edlstm_gates(gates[end], c_prev[end])
        torch.testing.assert_close((h[end], c[end]), want)
        want = reference.edlstm_gates_backward(h[end], c[end], gates[end], c_prev[end])
        torch.testing.assert_close(tuple(g[end] for g in grads), want)
