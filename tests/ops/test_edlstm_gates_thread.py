"""What a thread of the CUDA kernels of edlstm_gates computes, compiled for the host: arithmetic, indices, accesses.

Two instructions of a GPU, 2^y and 1 / x, are the C library's here, made as wrong as those may be. The rest is the very
code that nvcc compiles.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vpfast.ops.edlstm_gates import reference

ROOT = Path(__file__).parents[2]
TYPES = {
    "d": (torch.float64, torch.float64),
    "f": (torch.float32, torch.float32),
    "h": (torch.float16, torch.float16),
    "H": (torch.float16, torch.float32),
    "b": (torch.bfloat16, torch.bfloat16),
    "B": (torch.bfloat16, torch.float32),
}
WIDTHS = {"d": (1, 1), "f": (4, 4), "h": (8, 4), "H": (8, 4), "b": (8, 4), "B": (8, 4)}


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    """The library made of edlstm_gates_thread.cpp."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs a C++ compiler and csrc")
    library = tmp_path_factory.mktemp("threads") / "threads.so"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    source = Path(__file__).parent / "edlstm_gates_thread.cpp"
    flags = ["-shared", "-fPIC", "-std=c++17", "-O2", "-ffp-contract=off", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, *includes, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.divided.argtypes, loaded.divided.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return loaded


def inputs(rows, length, types, scale=3.0, seed=0, gap=0):
    """Gates (rows, 4 * length), cell and gradients (rows, length), `gap` elements between rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length, dtype, factor):
        wide = torch.randn(rows, length + gap, generator=generator, dtype=torch.float64) * factor
        return wide.to(dtype)[:, :length]

    gates_dtype, cell_dtype = TYPES[types]
    return (
        draw(4 * length, gates_dtype, scale),
        draw(length, cell_dtype, 1.0),
        draw(length, gates_dtype, 1.0),
        draw(length, cell_dtype, 1.0),
    )


def run(threads, types, gates, c_prev, grad_h=None, grad_c=None, order="fiog", backward=False, one_by_one=False):
    """(outputs, elements a thread) of forward or backward."""
    rows, length = c_prev.shape
    first = torch.full((rows, 4 * length if backward else length), torch.nan, dtype=gates.dtype)
    second = torch.full((rows, length), torch.nan, dtype=c_prev.dtype)
    offsets = [order.index(gate) * length for gate in "fiog"]
    grads = [grad.data_ptr() if grad is not None else 0 for grad in (grad_h, grad_c)]
    grad_strides = [grad.stride(0) if grad is not None else 0 for grad in (grad_h, grad_c)]
    outputs = [first.data_ptr(), second.data_ptr()]
    fields = [rows, length, *offsets, gates.data_ptr(), c_prev.data_ptr(), gates.stride(0), c_prev.stride(0)]
    fields += [*([0, 0] if backward else outputs), *grads, *grad_strides, *(outputs if backward else [0, 0])]
    packed = (ctypes.c_int64 * len(fields))(*fields)
    width = threads.run_threads(packed, ctypes.c_char(types.encode()), int(backward), int(one_by_one))
    return (first, second), width


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("scale", [1e-3, 0.1, 3.0, 30.0])
@pytest.mark.parametrize("types", TYPES)
def test_error_is_at_most_twice_that_of_the_reference(threads, types, scale):
    """Against float64, in the same precision, of small arguments and of saturated ones too. Where that is float64,
    nothing more exact stands beside the two: there they may differ by the rounding of a dozen operations."""
    gates, c_prev, grad_h, grad_c = inputs(64, 128, types, scale)
    c_prev = (c_prev * min(scale, 1.0)).contiguous()
    exact_inputs = [t.double() for t in (grad_h, grad_c, gates, c_prev)]
    exact = (
        *reference.edlstm_gates(*exact_inputs[2:], "gofi"),
        *reference.edlstm_gates_backward(*exact_inputs, "gofi"),
    )
    same_precision = (
        *reference.edlstm_gates(gates, c_prev, "gofi"),
        *reference.edlstm_gates_backward(grad_h, grad_c, gates, c_prev, "gofi"),
    )
    forward, forward_width = run(threads, types, gates, c_prev, order="gofi")
    backward, backward_width = run(threads, types, gates, c_prev, grad_h, grad_c, "gofi", backward=True)
    assert (forward_width, backward_width) == WIDTHS[types]
    for found, theirs, truth in zip((*forward, *backward), same_precision, exact, strict=True):
        limit = max(2 * relative_error(theirs, truth), 8 * torch.finfo(torch.float64).eps)
        assert relative_error(found, truth) <= limit


@pytest.mark.parametrize("types", ["d", "f", "h", "b"])
def test_small_and_large_arguments_keep_relative_accuracy(threads, types):
    """tanh near 0, both tails of sigmoid, and beyond: elementwise, where a norm would hide the small ones."""
    dtype, _ = TYPES[types]
    lowest = -30 if types != "h" else -4  # float16 has nothing normal below 6e-5
    x = torch.cat([torch.logspace(lowest, 1.9, 500, dtype=torch.float64) * sign for sign in (1, -1)]).to(dtype)
    open_gate, closed = torch.full_like(x, 20.0), torch.zeros_like(x)
    for gates, c_prev in (
        (torch.cat([closed, x.flip(0), open_gate, x]), closed),  # c = sigmoid(i) tanh(g)
        (torch.cat([x, closed, open_gate, closed]), torch.ones_like(x)),  # c = sigmoid(f)
        (torch.cat([open_gate, closed, x, closed]), torch.ones_like(x)),  # h = sigmoid(o) tanh(1)
        (torch.cat([open_gate, closed, open_gate, closed]), x),  # h = tanh(c')
    ):
        gates, c_prev = gates[None].contiguous(), c_prev[None].contiguous()
        found, _ = run(threads, types, gates, c_prev)
        exact = reference.edlstm_gates(gates.double(), c_prev.double())
        eps = torch.finfo(dtype).eps * (8 if types in "df" else 1)
        for ours, truth in zip(found, exact, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=eps, atol=1e-37 if types != "h" else 6e-8)


@pytest.mark.parametrize("types", TYPES)
def test_infinite_and_nan_inputs_follow_the_formula(threads, types):
    gates_dtype, cell_dtype = TYPES[types]
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.0, -200.0, 200.0])
    cases = torch.cartesian_prod(*[special] * 5)
    gates = cases[:, :4].t().reshape(1, -1).to(gates_dtype)
    c_prev = cases[:, 4].clone()[None].to(cell_dtype)
    found, _ = run(threads, types, gates, c_prev)
    known = ~torch.isinf(c_prev)
    for ours, theirs in zip(found, reference.edlstm_gates(gates, c_prev), strict=True):
        close = {"rtol": 4 * torch.finfo(ours.dtype).eps, "atol": 1e-30, "equal_nan": True}
        torch.testing.assert_close(ours[known], theirs[known], **close)
    assert not torch.isfinite(found[1][~known]).any()
    backward, _ = run(threads, types, gates, c_prev, torch.ones_like(found[0]), torch.ones_like(c_prev), backward=True)
    finite = torch.isfinite(cases).all(1)
    assert all(torch.isfinite(part[:, finite]).all() for part in (*backward[0].chunk(4, 1), backward[1]))
    a_nan = torch.isnan(cases).any(1)
    assert torch.isnan(found[0][:, a_nan]).all()
    assert torch.isnan(backward[0].reshape(4, -1)[2][torch.isnan(cases[:, 2])]).all()


@pytest.mark.parametrize("types", TYPES)
def test_one_element_or_many_at_once_give_the_same_bits(threads, types):
    for gap in (0, 8):
        given = inputs(5, 48, types, gap=gap)
        for backward in (False, True):
            arguments = given if backward else given[:2]
            many, width = run(threads, types, *arguments, backward=backward)
            one, single = run(threads, types, *arguments, backward=backward, one_by_one=True)
            assert (width, single) == (WIDTHS[types][backward], 1)
            assert all(torch.equal(a, b) for a, b in zip(many, one, strict=True))


@pytest.mark.parametrize("types", TYPES)
def test_missing_gradients_are_zeros(threads, types):
    gates, c_prev, grad_h, grad_c = inputs(3, 16, types)
    zero_h, zero_c = torch.zeros_like(grad_h), torch.zeros_like(grad_c)
    for missing, zeros in (((None, grad_c), (zero_h, grad_c)), ((grad_h, None), (grad_h, zero_c))):
        found, _ = run(threads, types, gates, c_prev, *missing, backward=True)
        want, _ = run(threads, types, gates, c_prev, *zeros, backward=True)
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@given(
    types=st.sampled_from(list(TYPES)),
    rows=st.integers(1, 9),
    length=st.integers(1, 40),
    gap=st.integers(0, 9),
    offset=st.integers(0, 3),
    shared=st.booleans(),
    order=st.permutations("fiog").map("".join),
)
def test_any_rows_and_any_place_in_memory(threads, types, rows, length, gap, offset, shared, order):
    gates, c_prev, grad_h, grad_c = inputs(rows, length, types, gap=gap)
    moved = torch.empty(gates.shape[0] * 4 * length + offset, dtype=gates.dtype)[offset:].view(rows, 4 * length)
    gates = moved.copy_(gates)
    if shared:
        c_prev = c_prev[:1].expand(rows, length)
    found, _ = run(threads, types, gates, c_prev, order=order)
    grads, _ = run(threads, types, gates, c_prev, grad_h, grad_c, order, backward=True)
    want = reference.edlstm_gates(gates, c_prev, order)
    want_grads = reference.edlstm_gates_backward(grad_h, grad_c, gates, c_prev, order)
    for ours, theirs in zip((*found, *grads), (*want, *want_grads), strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=8 * eps, atol=8 * eps)


@given(n=st.integers(0, 2**62), d=st.one_of(st.integers(1, 2**20), st.integers(1, 2**62)))
def test_division_by_multiplication(threads, n, d):
    assert threads.divided(n, d) == n // d
    assert threads.divided(n // d * d, d) == n // d  # a multiple, where a little too little would show
    assert threads.divided(max(n // d * d - 1, 0), d) == max(n // d * d - 1, 0) // d
