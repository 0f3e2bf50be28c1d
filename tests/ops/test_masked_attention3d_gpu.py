"""The ladder of masked_attention3d on a GPU; without one, of its Triton kernels in the interpreter.

Which tiles are visited is in test_masked_attention3d_tiles.py.
"""

import math

import interpreter
import pytest
import torch
from attention import (
    DTYPES,
    GRIDS,
    MASKS,
    NAMES,
    STRIDED,
    assert_error_at_most_twice,
    exact,
    inputs,
    length,
    options,
    oracle,
    specification,
    strided_cases,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vpfast
from vpfast import nn
from vpfast.models import SHRVQVAEConfig, STPixelCNN
from vpfast.models.shrvqvae import sample
from vpfast.ops import Mask3d, masked_attention3d, masked_attention3d_decode
from vpfast.ops._library import operator
from vpfast.ops.masked_attention3d import reference
from vpfast.ops.masked_attention3d.register import backends

CUDA = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
HALF = [torch.bfloat16, torch.float16]
# The interpreter takes some ten milliseconds a tile: it gets a part of every rung.
SOME = slice(None) if CUDA else slice(None, 1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter


@pytest.fixture
def place():
    """Where tensors go: there is no CUDA C++ kernel of this operator, so Triton serves, on a GPU or interpreted."""
    pytest.importorskip("triton")
    if not CUDA:
        interpreter.mend()
    with vpfast.backend("triton"):
        yield "cuda" if CUDA else "cpu"


@pytest.fixture(params=["surveyed", "short"])
def served(request, place, monkeypatch):
    """Clips of any length with a survey of their rows, or none: then the careful mode serves them."""
    from vpfast.kernels import masked_attention3d as kernels

    monkeypatch.setattr(kernels, "SURVEYED_FROM", 0 if request.param == "surveyed" else 2**40)
    return place


def there(place, tensors):
    return [tensor.to(place) for tensor in tensors]


def attention(q, k, v, grad, grid, mask, scale=None):
    """(out, lse, grad_q, grad_k, grad_v) by Triton's raw operators, on the CPU."""
    rules = options(q, grid, mask, scale)
    out, lse = operator("masked_attention3d", "triton")(q, k, v, *rules)
    gradients = operator("masked_attention3d_backward", "triton")(grad, q, k, v, out, lse, *rules)
    return tuple(tensor.cpu() for tensor in (out, lse, *gradients))


def assert_accurate(place, cases, dtype, scale=None, factor=1.0):
    """Cases (grid, mask, dim): results and gradients against float64, beside the reference."""
    ours, theirs, truth = [], [], []
    for seed, (grid, mask, dim) in enumerate(cases):
        q, k, v, grad = inputs(grid, dim, 1, 2 if CUDA else 1, dtype, seed)
        problem = (q, k, v, grad * factor)
        ours.append(attention(*there(place, problem), grid, mask, scale))
        theirs.append(specification(*problem, grid, mask, scale))
        truth.append(exact(*problem, grid, mask, scale))
        for found, wanted in zip(ours[-1], theirs[-1], strict=True):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert found.is_contiguous()
    assert_error_at_most_twice(ours, theirs, truth, dtype)


# --- accuracy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 4, 5), (2, 9, 9) if CUDA else (2, 6, 11)], ids=["short frames", "frames"])
@pytest.mark.parametrize("name", NAMES)
def test_every_mask(request, served, poisoned, name, grid):
    windows = [None, (1, 1, 1), (0, None, 3), (None, 2, None)]
    if not CUDA:
        windows = windows[:1] if "surveyed" in request.node.name else windows[-1:]
    assert_accurate(served, [(grid, Mask3d(name, window), 16) for window in windows], torch.bfloat16)


@pytest.mark.parametrize("name", ["eq6", "raster"][SOME])
def test_rows_walked_one_by_one(place, poisoned, name):
    assert_accurate(place, [((1, 2, 140), Mask3d(name, (None, 1, 9)), 8)], torch.float16)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES[SOME])
@pytest.mark.parametrize("mask", MASKS[SOME], ids=str)
def test_every_mask_on_every_grid(served, poisoned, mask, dtype):
    assert_accurate(served, [(grid, mask, 24) for grid in [*GRIDS, (4, 12, 12), (3, 16, 20), (2, 3, 300)]], dtype)


@pytest.mark.parametrize("served", ["surveyed", "short"][SOME], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 40, 130] if not CUDA else [1, 3, 8, 16, 17, 24, 32, 64, 80, 128, 130, 300])
def test_every_head_dimension(served, poisoned, dim, dtype):
    grid = (3, 9, 9) if CUDA else (2, 3, 4)
    assert_accurate(served, [(grid, Mask3d("separable", (1, None, None)), dim)], dtype)


@pytest.mark.parametrize("served", ["surveyed", "short"][SOME], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("scale", "factor"), [(3.0, 1.0), (-0.5, 1e-6), (0.0, 300.0)])
def test_scores_and_gradients_of_any_size(served, dtype, scale, factor):
    """Scores too large to be left as they are, gradients that float16 would round off or overflow in."""
    grid = (2, 8, 9) if CUDA else (2, 3, 8)
    assert_accurate(served, [(grid, Mask3d(name), 16) for name in ("raster", "eq6")], dtype, scale, factor)


@pytest.mark.parametrize("spread", [1e3, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(served, dtype, spread):
    """Scores up to ``spread``, that rise, fall or jump along the keys."""
    grid, dim = (3, 5, 5) if CUDA else (2, 3, 4), 16
    L = length(grid)
    for name, order in [*zip(NAMES, (1, -1, 7, 8, 11), strict=True)][:: 1 if CUDA else 3]:
        mask = Mask3d(name)
        k = (torch.arange(L) * order % L).to(dtype)[:, None].expand(1, 1, L, dim)
        q = torch.full((1, 1, L, dim), spread / dim / L, dtype=dtype)
        v, grad = inputs(grid, dim, 1, 1, dtype, count=2)
        found = attention(*there(served, (q, k, v, grad)), grid, mask, 1.0)
        out, lse = exact(q, k, v, grad, grid, mask, 1.0)[:2]
        eps, of_sums = torch.finfo(dtype).eps, torch.finfo(found[1].dtype).eps
        of_weights = of_sums * (spread if spread < 1e8 else 1)  # the error of a score is that of its exponential
        torch.testing.assert_close(found[0].double(), out, rtol=4 * eps, atol=4 * max(eps, of_weights))
        torch.testing.assert_close(found[1].double(), lse, rtol=8 * of_sums, atol=64 * of_sums)
        assert all(tensor.isfinite().all() for tensor in found[2:])


@needs_gpu
@pytest.mark.parametrize("dim", [16, 32, 64, 128][SOME])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32][SOME])
@pytest.mark.parametrize("name", NAMES[SOME])
def test_long_clips(place, name, dtype, dim):
    assert_accurate(place, [((7, 16, 16), Mask3d(name), dim), ((2, 32, 33), Mask3d(name, (None, 4, None)), dim)], dtype)


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_query_that_sees_nothing_gives_0_and_gets_0(served, poisoned, name, dtype):
    grid = (2, 8, 9) if CUDA else (2, 3, 4)
    for window in [None, (0, 0, 0)][SOME]:
        mask = Mask3d(name, window)
        out, lse, grad_q, grad_k, grad_v = attention(*there(served, inputs(grid, 8, 1, 1, dtype)), grid, mask)
        seen = mask.visible(grid)
        blind, unseen = ~seen.any(1), ~seen.any(0)
        assert (out[:, :, blind] == 0).all()
        assert lse[:, :, blind].isneginf().all()
        assert lse[:, :, ~blind].isfinite().all()
        assert (grad_q[:, :, blind] == 0).all()
        assert (grad_k[:, :, unseen] == 0).all()
        assert (grad_v[:, :, unseen] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf][SOME])
@pytest.mark.parametrize("name", NAMES if CUDA else ["separable", "eq6"])
def test_what_is_not_seen_has_no_part_whatever_it_holds(served, name, value):
    """Everything at one position is not a number: what may know of it is spoilt, all else as if it were not there."""
    grid, dtype = (2, 9, 9) if CUDA else (2, 5, 7), torch.bfloat16
    mask = Mask3d(name, (None, 3, None))
    clean = inputs(grid, 16, 1, 1, dtype)
    seen = mask.visible(grid)
    want = attention(*there(served, clean), grid, mask)
    for position in (0, 3, 40, 80, 81, 100, 161) if CUDA else (20,):
        spoilt = [tensor.clone() for tensor in clean]
        for tensor in spoilt:
            tensor[:, :, position] = value
        found = attention(*there(served, spoilt), grid, mask)
        rows = seen[:, position].clone()
        rows[position] = seen[position].any()
        for ours, right in zip(found[:3], want[:3], strict=True):
            torch.testing.assert_close(ours[:, :, ~rows], right[:, :, ~rows], rtol=0.02, atol=0.02)
        keys = seen[rows].any(0)  # those that a spoilt row sees
        for ours, right in zip(found[3:], want[3:], strict=True):
            torch.testing.assert_close(ours[:, :, ~keys], right[:, :, ~keys], rtol=0.02, atol=0.02)
        if math.isnan(value):
            assert found[0][:, :, rows].isnan().all()
            assert all(tensor[:, :, keys].isnan().all() for tensor in found[3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinities_that_are_seen_follow_the_formula(served, dtype):
    grid, mask = (3, 4, 5), Mask3d("separable")
    q, k, v = inputs(grid, 8, 1, 1, dtype, count=3)
    q, seen = q.abs() + 0.1, mask.visible(grid)
    low, high, strange = k.clone(), k.clone(), v.clone()
    low[:, :, 6], high[:, :, 6], strange[:, :, 6, 3] = -math.inf, math.inf, math.inf

    def out(*given):
        return operator("masked_attention3d", "triton")(*there(served, given), *options(q, grid, mask))[0].cpu()

    without = seen.clone()
    without[:, 6] = False  # a score of -inf is a key that is not seen
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * 8**-0.5
    want = scores.masked_fill(~without, -math.inf).softmax(-1) @ v.double()
    eps, plain = torch.finfo(dtype).eps, out(q, k, v)
    torch.testing.assert_close(out(q, low, v).double(), want, rtol=4 * eps, atol=16 * eps)
    found = out(q, high, v)
    assert found[:, :, seen[:, 6]].isnan().all()
    torch.testing.assert_close(found[:, :, ~seen[:, 6]], plain[:, :, ~seen[:, 6]], rtol=4 * eps, atol=16 * eps)
    found = out(q, k, strange)
    assert not found[:, :, seen[:, 6], 3].isfinite().any()
    found[:, :, seen[:, 6], 3] = plain[:, :, seen[:, 6], 3]
    torch.testing.assert_close(found, plain, rtol=4 * eps, atol=16 * eps)


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("served", ["surveyed", "short"][SOME], indirect=True)
@pytest.mark.parametrize("case", strided_cases())
def test_strides(served, poisoned, case):
    tensors, mask = strided_cases()[case], Mask3d("eq6", (None, 1, 1))
    if not CUDA:
        tensors = [tensor[:1, 1:] for tensor in tensors]
    tensors = [tensor.bfloat16() for tensor in tensors]
    found = attention(*there(served, tensors), STRIDED, mask)
    dense = attention(*there(served, [tensor.contiguous() for tensor in tensors]), STRIDED, mask)
    torch.testing.assert_close(found, dense, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(found, specification(*tensors, STRIDED, mask), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("grid", [(0, 3, 4), (2, 3, 0), (2, 3, 4)])
@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (1, 1)])
def test_empty(served, grid, batch, heads):
    tensors = there(served, inputs(grid, 5, batch, heads))
    found = attention(*tensors, grid, Mask3d("raster"))
    assert [t.shape for t in found] == [t.shape for t in specification(*tensors, grid, Mask3d("raster"))]
    none = torch.zeros(0, dtype=torch.int64, device=served)
    decoded = masked_attention3d_decode(tensors[0][:, :, :0], *tensors[1:3], grid, none, Mask3d("raster"))
    assert decoded.shape == (batch, heads, 0, 5)


@st.composite
def problems(draw):
    """A grid, mask, type and tensors of any strides."""
    grid = tuple(draw(st.tuples(*[st.integers(0, 9 if CUDA else 5)] * 3)))
    radius = st.none() | st.integers(0, 4)
    mask = Mask3d(draw(st.sampled_from(NAMES)), draw(st.none() | st.tuples(radius, radius, radius)))
    shape = (draw(st.integers(0, 2)), draw(st.integers(1, 2)), length(grid), draw(st.integers(1, 40)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(_):
        perm, gap = draw(st.permutations(range(4))), draw(st.integers(1, 2))
        kept = [draw(st.booleans()) or draw(st.booleans()) for _ in range(4)]
        stored = [(shape[p] if kept[p] else min(1, shape[p])) * gap for p in perm]
        strided = torch.randn(stored, generator=generator).to(dtype)[(slice(None, None, gap),) * 4]
        return strided.permute([perm.index(d) for d in range(4)]).expand(shape)

    return grid, mask, [tensor(k) for k in range(4)]


def assert_close_as_sums(found, want, dtype):
    """Sums in another order, of weights that were rounded where they are products' factors."""
    eps, roundings = torch.finfo(dtype).eps, 16 if dtype in HALF else 1024
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == theirs.dtype
        size = max([1.0, *theirs[theirs.isfinite()].abs().tolist()])
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=roundings * eps * size)


# On a GPU nearly every example is compiled first.
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10 if CUDA else 6)
@given(problem=problems(), data=st.data())
def test_any_grid_mask_and_stride(served, problem, data):
    grid, mask, tensors = problem
    want = specification(*tensors, grid, mask)
    assert_close_as_sums(attention(*there(served, tensors), grid, mask), want, tensors[0].dtype)
    L = length(grid)
    positions = torch.tensor(data.draw(st.lists(st.integers(0, max(0, L - 1)), max_size=4 if L else 0))).long()
    assert_close_as_sums(
        [decoded(served, *tensors[:3], grid, positions, mask)], [want[0][:, :, positions]], want[0].dtype
    )


# --- decoding --------------------------------------------------------------------------------------------------------


def decoded(place, q, k, v, grid, positions, mask):
    """The rows at ``positions``, from caches in which what none of them sees was never written."""
    known = mask.visible(grid, positions).any(0)
    caches = [torch.where(known[:, None], tensor, math.nan) for tensor in (k, v)]
    rows, keys, values = there(place, (q[:, :, positions], *caches))
    return masked_attention3d_decode(rows, keys, values, grid, positions.to(place), mask).cpu()


@pytest.mark.parametrize("dtype", DTYPES if CUDA else [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_decode_gives_the_rows_of_the_whole(place, poisoned, name, dtype):
    ours, theirs, truth = [], [], []
    for seed, (grid, window, dim) in enumerate(
        [((3, 4, 5), None, 8), ((2, 12, 12), None, 40), ((2, 9, 17), (1, 2, 3), 5), ((1, 1, 170), (None, None, 9), 130)]
    ):
        mask, (q, k, v, _) = Mask3d(name, window), inputs(grid, dim, 1, 2 if CUDA else 1, dtype, seed)
        L = length(grid)
        positions = torch.tensor([L - 1, L // 2, 0, L // 2, L - 7])
        found = decoded(place, q, k, v, grid, positions, mask)
        assert found.dtype == dtype
        assert found.is_contiguous()
        ours.append([found])
        theirs.append([specification(q, k, v, q, grid, mask)[0][:, :, positions]])
        truth.append([oracle(q.double(), k.double(), v.double(), grid, mask)[0][:, :, positions]])
    assert_error_at_most_twice(ours, theirs, truth, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_decode_of_long_caches_is_shared_out(place, poisoned, name):
    """Among two programs and more, some of which have nothing to do."""
    grid, mask = (2, 16, 33), Mask3d(name)
    q, k, v, _ = inputs(grid, 3, 1, 1)
    positions = torch.tensor([1055, 528, 17, 0])
    found = decoded(place, q, k, v, grid, positions, mask)
    torch.testing.assert_close(found, specification(q, k, v, q, grid, mask)[0][:, :, positions])


@pytest.mark.parametrize("case", strided_cases())
def test_decode_reads_caches_of_any_stride(place, poisoned, case):
    q, k, v, _ = strided_cases()[case] if CUDA else (tensor[:1, 1:] for tensor in strided_cases()[case])
    positions, mask = torch.tensor([29, 3, 3, 17]), Mask3d("raster", (1, None, 2))
    want = reference.masked_attention3d_decode(q[:, :, positions], k, v, positions, STRIDED, mask, 6**-0.5)
    for rows in (q[:, :, positions], q[:, :, positions].mT.contiguous().mT):
        on_device = there(place, (rows, k, v))
        found = masked_attention3d_decode(*on_device, STRIDED, positions.to(place), mask)
        torch.testing.assert_close(found.cpu(), want)


def test_decode_outside_the_grid_is_not_a_number(place):
    q, k, v, _ = there(place, inputs((2, 3, 4), 8, 1, 1))
    positions = torch.tensor([5, 24, -1], device=place)
    rules = options(q, (2, 3, 4), Mask3d("raster"))
    out = operator("masked_attention3d_decode", "triton")(q[:, :, :3], k, v, positions, *rules)
    assert out.isnan().flatten(3).all(-1).flatten().tolist() == [False, True, True]


# --- what PyTorch expects --------------------------------------------------------------------------------------------

GRID, MASK = (2, 3, 4), Mask3d("eq6", (1, None, 2))
POSITIONS = torch.tensor([23, 5, 5, 14])


@pytest.mark.parametrize("case", ["one projection", "contiguous", "mixed"][SOME])
def test_opcheck(place, case):
    q, k, v, grad = (tensor[:1, :2] for tensor in there(place, strided_cases()[case]))
    rules = options(q, STRIDED, Mask3d("separable", (1, None, 2)))
    forward, backward, decode = (
        operator(f"masked_attention3d{form}", "triton") for form in ("", "_backward", "_decode")
    )
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    torch.library.opcheck(forward.default, (*leaves, *rules))
    out, lse = forward(q, k, v, *rules)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(backward.default, (grad, q, k, v, out, lse, *rules), test_utils=tests)
    positions = POSITIONS.to(place)
    torch.library.opcheck(decode.default, (q[:, :, positions], k, v, positions, *rules))


def test_gradients_reach_every_input(place):
    """One head of keys and values for all, and the gradient with strides of 0 that a sum gives."""
    q, k, v = inputs(GRID, 8, heads=3, count=3)
    ours = [tensor.to(place).requires_grad_() for tensor in (q, k[:, :1], v[:, :1])]
    theirs = [tensor.detach().cpu().double().requires_grad_() for tensor in ours]
    expanded = [tensor.expand(-1, 3, -1, -1) for tensor in ours[1:]]
    masked_attention3d(ours[0], *expanded, GRID, MASK).sum().backward()
    oracle(theirs[0], *(tensor.expand(-1, 3, -1, -1) for tensor in theirs[1:]), GRID, MASK)[
        0
    ].nan_to_num().sum().backward()
    for found, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad.cpu().double(), want.grad.nan_to_num(), rtol=1e-5, atol=1e-5)


def test_gradients_that_there_are_not(place):
    q, k, v = (tensor.to(place).requires_grad_() for tensor in inputs(GRID, 8, 1, 1, count=3))
    out = masked_attention3d(q, k, v, GRID, MASK)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match="decode is for inference"):
        masked_attention3d_decode(q[:, :, :4], k, v, GRID, POSITIONS.to(place), MASK)


@pytest.mark.parametrize("dynamic", [True, False][SOME])
def test_compile_fullgraph(place, dynamic):
    def layer(features, positions):
        q, k, v = features.flatten(2).unflatten(1, (3, 1, -1)).mT.unbind(1)
        grid = features.shape[2:]
        with torch.no_grad():
            some = masked_attention3d_decode(q[:, :, positions], k, v, grid, positions, MASK)
        return masked_attention3d(q * 2, k, v, grid, MASK) + 1, some

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="inductor" if CUDA else "aot_eager")
    for grid in ((2, 3, 4), (3, 4, 5)):
        ours = torch.randn(1, 24, *grid, device=place, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        positions = POSITIONS.to(place)
        found, want = compiled(ours, positions), layer(theirs, positions)
        torch.testing.assert_close(found, want)
        found[0].square().sum().backward()
        want[0].square().sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(place, dtype):
    q, k, v = (tensor.to(place).requires_grad_() for tensor in inputs(GRID, 16, 1, 1, count=3))
    with torch.autocast(torch.device(place).type, dtype):
        out = masked_attention3d(q, k, v, GRID, MASK)
        out.square().sum().backward()
    assert out.dtype == dtype
    assert q.grad.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(out, masked_attention3d(*(tensor.to(dtype) for tensor in (q, k, v)), GRID, MASK))


@pytest.mark.parametrize("mask", [Mask3d("eq6"), Mask3d("raster"), Mask3d("separable", (None, 3, 2))][SOME], ids=str)
def test_every_run_gives_the_same_bits(served, mask):
    grid = (6, 32, 32) if CUDA else (2, 5, 7)
    tensors = there(served, inputs(grid, 16, 2 if CUDA else 1, 1, torch.bfloat16))
    first = attention(*tensors, grid, mask)
    for _ in range(10 if CUDA else 1):
        assert all(torch.equal(a, b) for a, b in zip(attention(*tensors, grid, mask), first, strict=True))


def test_the_compiled_backend_refuses_a_gpu():
    assert "cuda" not in backends.native
    with (
        vpfast.backend("native"),
        pytest.raises(vpfast.ops._backend.BackendError, match=r"native: .*no .*kernel|native: .*extension"),
    ):
        backends.select("cuda")


@needs_gpu
def test_a_gpu_is_served_by_triton():
    assert backends.select("cuda") == "triton"


# --- modules and models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axial", [False, True])
@pytest.mark.parametrize("name", ["eq6", "raster"][SOME])
def test_module(place, name, axial):
    """Whole and step by step, against the reference."""
    grid = (2, 3, 4)
    torch.manual_seed(0)
    module = nn.MaskedAttention3d(6, heads=3, mask=name, axial=axial).to(place)
    x = torch.randn(1, 6, *grid, device=place)
    positions = torch.arange(24, device=place)
    out = module(x)
    cache = module.init_cache(1, grid)
    tokens = x.flatten(2).mT
    steps = [module.extend(tokens[:, some], some, cache) for some in positions.split(7)]
    with vpfast.backend("reference"):
        want = module(x)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(steps, 1), want.flatten(2).mT, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["raster", "eq6", "past_frames"])
def test_sampler(place, conditioning):
    """The codes of the cached sampler are those of the reference."""
    torch.manual_seed(0)
    config = SHRVQVAEConfig(
        codebook_size=3, layers=2, prior_channels=6, prior_blocks=2, prior_heads=3, prior_head_dim=2, prior_ffn=5,
        prior_head=5, conditioning=conditioning,
    )  # fmt: skip
    prior = STPixelCNN(config).to(place, torch.float64)
    codes = torch.randint(3, (1, 2, 2, 3, 2), device=place)
    found = sample(prior, codes, 1, temperature=0.9, seed=3)
    with vpfast.backend("reference"):
        assert torch.equal(found, sample(prior, codes, 1, temperature=0.9, seed=3))


# --- on a GPU only ---------------------------------------------------------------------------------------------------


def rows_of(reference_of, tensors, grid, mask, rows):
    q, k, v = (tensor[:1, :1].double() for tensor in tensors)
    return reference_of(q[:, :, rows], k, v, rows, grid, mask, q.shape[-1] ** -0.5)


@needs_gpu
@pytest.mark.parametrize("name", ["raster", "eq6"])
def test_the_clip_of_the_benchmark(place, name):
    """L = 30,720: some rows against float64, in memory that holds no square of L."""
    grid, mask = (30, 32, 32), Mask3d(name)
    tensors = there(place, inputs(grid, 16, 1, 2, torch.bfloat16, count=3))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = masked_attention3d(*leaves, grid, mask)
    out.backward(torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 2**28
    rows = torch.tensor([1, 1025, 12345, 30719], device=place)
    want = rows_of(reference.masked_attention3d_decode, tensors, grid, mask, rows)
    torch.testing.assert_close(out[:1, :1, rows].double(), want, rtol=0.02, atol=0.01)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph(place, dtype):
    """Captured once, replayed on other inputs: no synchronization, nothing copied from the host."""
    grid, mask = (3, 20, 20), Mask3d("separable", (None, 4, None))
    tensors = there(place, inputs(grid, 32, dtype=dtype))
    positions = torch.tensor([7, 1100], device=place)

    def everything():
        rules = options(tensors[0], grid, mask)
        forward, backward, decode = (operator(f"masked_attention3d{s}", "triton") for s in ("", "_backward", "_decode"))
        out, lse = forward(*tensors[:3], *rules)
        gradients = backward(tensors[3], *tensors[:3], out, lse, *rules)
        return out, lse, *gradients, decode(tensors[0][:, :, positions], *tensors[1:3], positions, *rules)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        everything()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for seed in (1, 2):
        for tensor, fresh in zip(tensors, inputs(grid, 32, dtype=dtype, seed=seed), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, everything(), strict=True))


@needs_gpu
def test_work_is_queued_on_the_current_stream(place):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        q, k, v = there(place, inputs((4, 16, 16), 32, count=3))
        torch.cuda._sleep(20_000_000)
        q.mul_(0.5)
        found = masked_attention3d(q, k, v, (4, 16, 16), Mask3d("raster"))
        want = reference.masked_attention3d(q, k, v, (4, 16, 16), Mask3d("raster"), 32**-0.5)[0]
    side.synchronize()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_tensors_of_another_device_than_the_current_one(place):
    q, k, v = there("cuda:1", inputs((3, 9, 9), 32, count=3))
    found = masked_attention3d(q, k, v, (3, 9, 9), Mask3d("raster"))
    assert found.device == q.device
    want = reference.masked_attention3d(q, k, v, (3, 9, 9), Mask3d("raster"), 32**-0.5)[0]
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.xdist_group("memory")
def test_more_than_two_to_the_31_elements(place):
    """Heads of 2^16 positions, and so many that only 64-bit offsets reach the last, which is compared to the first."""
    grid, mask = (64, 32, 32), Mask3d("raster", (2, None, None))
    heads = 2**31 // (2**16 * 32) + 1
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    q, k, v = (
        tensor.expand(-1, heads, -1, -1).contiguous()
        for tensor in there(place, inputs(grid, 32, 1, 1, torch.bfloat16, count=3))
    )
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = masked_attention3d(*leaves, grid, mask)
    out.backward(q.detach())
    for tensor in (out, *(leaf.grad for leaf in leaves)):
        assert torch.equal(tensor[:, 0], tensor[:, -1])
    rows = torch.tensor([5, 65535], device=place)
    want = rows_of(reference.masked_attention3d_decode, [tensor.detach() for tensor in leaves], grid, mask, rows)
    torch.testing.assert_close(out[:1, :1, rows].double(), want, rtol=0.02, atol=0.01)
