"""The ladder of masked_attention3d: formula, accuracy, extremes, gradients, layouts, decoding, repeatability.

What PyTorch expects of an operator is in test_masked_attention3d_torch.py; the masks themselves and what is refused in
test_masked_attention3d_mask.py.
"""

import math

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
    native,
    operator,
    options,
    oracle,
    soil_memory,
    solved,
    specification,
    strided_cases,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory import peak_of

from vpfast.ops import Mask3d, _native, masked_attention3d, masked_attention3d_decode
from vpfast.ops.masked_attention3d import reference

# --- formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_reference_is_a_softmax_over_what_is_seen(name):
    grid, mask, scale = (3, 2, 3), Mask3d(name, (1, None, 1)), -0.7
    q, k, v = inputs(grid, dim=3, batch=1, heads=1, dtype=torch.float64, count=3)
    out, lse = reference.masked_attention3d(q, k, v, grid, mask, scale)
    for i, row in enumerate(mask.visible(grid).tolist()):
        seen = [j for j, visible in enumerate(row) if visible]
        weights = {j: math.exp(scale * sum((q[0, 0, i] * k[0, 0, j]).tolist())) for j in seen}
        total = sum(weights.values())
        assert lse[0, 0, i].item() == pytest.approx(math.log(total) if seen else -math.inf, abs=1e-13)
        for c in range(3):
            want = sum(weights[j] * v[0, 0, j, c].item() for j in seen) / total if seen else 0
            assert out[0, 0, i, c].item() == pytest.approx(want, abs=1e-13)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_reference_backward_is_the_derivative_of_reference(mask):
    grid = (3, 3, 4)
    given = inputs(grid, dim=5, dtype=torch.float64)
    q, k, v = (tensor.clone().requires_grad_() for tensor in given[:3])
    out, lse = reference.masked_attention3d(q, k, v, grid, mask, 0.4)
    want = torch.autograd.grad(out, (q, k, v), given[3])
    torch.testing.assert_close(specification(*given, grid, mask, 0.4)[2:], want, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((out, lse), oracle(q, k, v, grid, mask, 0.4), rtol=1e-12, atol=1e-14)


# --- accuracy --------------------------------------------------------------------------------------------------------


def assert_accurate(cases, dtype):
    """Cases (grid, mask, dim): results and gradients of the operators, against float64, beside the reference."""
    ours, theirs, truth = [], [], []
    for seed, (grid, mask, dim) in enumerate(cases):
        given, wanted, right = solved(grid, mask, dim, dtype, seed)
        soil_memory()
        ours.append(operator(*given, grid, mask))
        theirs.append(wanted)
        truth.append(right)
        for found, wanted in zip(ours[-1], theirs[-1], strict=True):
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert found.is_contiguous()
    assert_error_at_most_twice(ours, theirs, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_mask_on_every_grid(isa, poisoned, mask, dtype):
    assert_accurate([(grid, mask, 24) for grid in GRIDS], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "dims", [(1, 2, 3), (5, 7, 8, 9), (12, 16, 17), (24, 31, 32, 33), (48, 63, 64, 80), (127, 128)]
)
def test_every_head_dimension(isa, poisoned, dims, dtype):
    pairs = [((3, 5, 7), Mask3d("raster")), ((2, 9, 9), Mask3d("separable", (1, 2, None)))]
    assert_accurate([(*pair, dim) for pair in pairs for dim in dims], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions_beyond_the_native_ones(isa, poisoned, dtype):
    assert_accurate([((3, 4, 7), Mask3d("raster"), dim) for dim in (129, 160, 256, 300)], dtype)


@pytest.mark.parametrize("grid", [(4, 7, 5), (2, 13, 13)])
@pytest.mark.parametrize("name", NAMES)
def test_several_tiles_in_half_precision(isa, poisoned, name, grid):
    for dtype in (torch.float16, torch.bfloat16):
        assert_accurate([(grid, Mask3d(name, window), 32) for window in (None, (1, 3, None))], dtype)


@native
def test_every_isa_agrees():
    grid, mask = (4, 7, 9), Mask3d("separable", (2, None, 4))
    given = inputs(grid, 24)
    results = []
    for name in ("plain", "avx2", "avx512", "amx"):
        try:
            _native.extension.select_isa(name)
        except ValueError:
            continue
        results.append(operator(*given, grid, mask))
    _native.extension.select_isa("auto")
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0, 0.0, -0.5, 3, 1e-6])
@pytest.mark.parametrize("name", NAMES)
def test_any_scale(isa, name, scale):
    grid, mask = (3, 5, 6), Mask3d(name)
    given = inputs(grid, 8, dtype=torch.float64)
    want = exact(*given, grid, mask, scale)
    torch.testing.assert_close(operator(*given, grid, mask, scale), want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(masked_attention3d(*given[:3], grid, mask, scale), want[0], rtol=1e-11, atol=1e-12)


def test_scale_0_is_the_mean_of_what_is_seen(isa):
    grid, mask = (3, 4, 4), Mask3d("raster")
    q, k, v = inputs(grid, count=3)
    mean = v.cumsum(2) / torch.arange(1, length(grid) + 1)[:, None]
    torch.testing.assert_close(masked_attention3d(q, k, v, grid, mask, 0), mean)


# --- extremes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_query_that_sees_nothing_gives_0_and_gets_0(isa, poisoned, name):
    grid = (3, 3, 5)
    for window in (None, (0, 0, 0), (1, 0, 0)):
        mask = Mask3d(name, window)
        q, k, v, grad = inputs(grid)
        out, lse, grad_q, grad_k, grad_v = operator(q, k, v, grad, grid, mask)
        seen = mask.visible(grid)
        blind, unseen = ~seen.any(1), ~seen.any(0)
        assert (out[:, :, blind] == 0).all()
        assert lse[:, :, blind].isneginf().all()
        assert lse[:, :, ~blind].isfinite().all()
        assert (grad_q[:, :, blind] == 0).all()
        assert (grad_k[:, :, unseen] == 0).all()
        assert (grad_v[:, :, unseen] == 0).all()


@pytest.mark.parametrize("spread", [30, 1e3, 1e8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_large_scores(isa, dtype, spread):
    """Scores up to ``spread`` that rise, fall or jump along the keys; at 1e8 so far apart that one key is left."""
    grid, dim = (3, 9, 9), 8
    L = length(grid)
    for name, order in zip(NAMES, (1, -1, 7, 5, 11), strict=True):
        mask = Mask3d(name)
        k = (torch.arange(L) * order % L).to(dtype)[:, None].expand(1, 2, L, dim)
        q = torch.full((1, 2, L, dim), spread / dim / L, dtype=dtype)
        v, grad = inputs(grid, dim, 1, dtype=dtype, count=2)
        found = operator(q, k, v, grad, grid, mask, 1.0)
        out, lse = exact(q, k, v, grad, grid, mask, 1.0)[:2]
        eps, of_sums = torch.finfo(dtype).eps, torch.finfo(found[1].dtype).eps
        of_weights = of_sums * (spread if spread < 1e8 else 1)  # the error of a score is that of its exponential
        torch.testing.assert_close(found[0].double(), out, rtol=4 * eps, atol=4 * max(eps, of_weights))
        torch.testing.assert_close(found[1].double(), lse, rtol=8 * of_sums, atol=64 * of_sums)
        assert all(tensor.isfinite().all() for tensor in found[2:])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_is_not_seen_has_no_part_whatever_it_holds(isa, mask, value):
    """Everything at one position is not a number: what may know of it is spoilt, all else as if it were not there."""
    grid = (3, 3, 5)
    clean = inputs(grid, 9)
    seen = mask.visible(grid)
    for position in (0, 20, 33, 44):
        spoilt = [tensor.clone() for tensor in clean]
        for tensor in spoilt:
            tensor[:, :, position] = value
        found, want = operator(*spoilt, grid, mask), operator(*clean, grid, mask)
        rows = seen[:, position].clone()
        rows[position] = seen[position].any()
        for ours, right in zip(found[:3], want[:3], strict=True):
            torch.testing.assert_close(ours[:, :, ~rows], right[:, :, ~rows])
        keys = seen[rows].any(0)  # those that a spoilt row sees
        for ours, right in zip(found[3:], want[3:], strict=True):
            torch.testing.assert_close(ours[:, :, ~keys], right[:, :, ~keys])
        if math.isnan(value):
            assert found[0][:, :, rows].isnan().all()
            assert all(tensor[:, :, keys].isnan().all() for tensor in found[3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_infinities_that_are_seen_follow_the_formula(isa, name, dtype):
    grid, mask = (3, 4, 5), Mask3d(name)
    q, k, v = inputs(grid, 8, dtype=dtype, count=3)
    q, seen = q.abs() + 0.1, mask.visible(grid)
    out = masked_attention3d(q, k, v, grid, mask)
    low, high, strange = k.clone(), k.clone(), v.clone()
    low[:, :, 6], high[:, :, 6], strange[:, :, 6, 3] = -math.inf, math.inf, math.inf
    without = mask.visible(grid)
    without[:, 6] = False  # a score of -inf is a key that is not seen
    known = without.any(1) == seen.any(1)
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * 8**-0.5
    want = scores.masked_fill(~without, -math.inf).softmax(-1).nan_to_num(0) @ v.double()
    eps = torch.finfo(dtype).eps
    found = masked_attention3d(q, low, v, grid, mask)
    torch.testing.assert_close(found[:, :, known].double(), want[:, :, known], rtol=4 * eps, atol=16 * eps)
    found = masked_attention3d(q, high, v, grid, mask)
    assert found[:, :, seen[:, 6]].isnan().all()
    torch.testing.assert_close(found[:, :, ~seen[:, 6]], out[:, :, ~seen[:, 6]])
    found = masked_attention3d(q, k, strange, grid, mask)
    assert not found[:, :, seen[:, 6], 3].isfinite().any()
    found[:, :, seen[:, 6], 3] = out[:, :, seen[:, 6], 3]
    torch.testing.assert_close(found, out)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, (1, 1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(isa, name, window):
    grid = (3, 2, 3)
    given = [tensor.requires_grad_() for tensor in inputs(grid, 4, 1, dtype=torch.float64, count=3)]
    assert torch.autograd.gradcheck(lambda q, k, v: masked_attention3d(q, k, v, grid, Mask3d(name, window)), given)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_a_change_moves_what_sees_it_and_nothing_else(isa, mask):
    """To the bit: a key moves the queries that see it, and the gradient at a query the keys that it sees."""
    grid = (4, 3, 5)
    q, k, v, grad = inputs(grid, 8)
    seen = mask.visible(grid)
    before = operator(q, k, v, grad, grid, mask)
    for position in (0, 8, 22, 41, 59):
        changed = [tensor.clone() for tensor in (k, v, grad)]
        for tensor in changed:
            tensor[:, :, position] += 1.5
        after = torch.ops.vpfast.masked_attention3d(q, *changed[:2], *options(q, grid, mask))
        for old, new in zip(before, after, strict=False):
            moved = (old != new).flatten(3).any(-1) if old.dim() == 4 else old != new
            expected = seen[:, position]
            if (
                old.dim() == 4 and expected.any()
            ):  # a query that sees this key alone has the value's change all the same
                assert moved[:, :, expected].all()
            assert not moved[:, :, ~expected].any()
        gradients = torch.ops.vpfast.masked_attention3d_backward(
            changed[2], q, k, v, *before[:2], *options(q, grid, mask)
        )
        for old, new, expected in zip(
            before[2:], gradients, (torch.arange(length(grid)) == position, seen[position], seen[position]), strict=True
        ):
            assert not (old != new).any(-1)[:, :, ~expected].any()
        assert (before[4] != gradients[2]).any(-1)[:, :, seen[position]].all()


def test_gradients_of_a_sum_and_of_expanded_heads(isa):
    """One head of keys and values for all, and the gradient with strides of 0 that a sum gives."""
    grid, mask = (3, 4, 5), Mask3d("separable")
    q, k, v = inputs(grid, 8, heads=3, count=3)
    ours = [tensor.clone().requires_grad_() for tensor in (q, k[:, :1], v[:, :1])]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    masked_attention3d(ours[0], *(tensor.expand(-1, 3, -1, -1) for tensor in ours[1:]), grid, mask).sum().backward()
    oracle(theirs[0], *(tensor.expand(-1, 3, -1, -1) for tensor in theirs[1:]), grid, mask)[0].sum().backward()
    for found, want in zip(ours, theirs, strict=True):
        assert found.grad.shape == found.shape
        torch.testing.assert_close(found.grad.double(), want.grad, rtol=1e-5, atol=1e-5)


def test_only_one_input_needs_a_gradient():
    grid = (2, 3, 4)
    for which in range(3):
        given = inputs(grid, count=3)
        given[which].requires_grad_()
        masked_attention3d(*given, grid, Mask3d("raster")).square().sum().backward()
        assert [tensor.grad is not None for tensor in given] == [k == which for k in range(3)]


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", strided_cases())
def test_strides(isa, poisoned, case):
    given = strided_cases()[case]
    for mask in (Mask3d("raster"), Mask3d("eq6", (None, 1, 1))):
        found = operator(*given, STRIDED, mask)
        want = specification(*(tensor.contiguous() for tensor in given), STRIDED, mask)
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
        assert all(tensor.is_contiguous() for tensor in found)


@pytest.mark.parametrize("grid", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 4)])
@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (2, 2)])
def test_empty(isa, grid, batch, heads):
    given = inputs(grid, 5, batch, heads)
    for mask in MASKS[::5]:
        found = operator(*given, grid, mask)
        assert [tensor.shape for tensor in found] == [tensor.shape for tensor in specification(*given, grid, mask)]
        decoded = masked_attention3d_decode(given[0][:, :, :0], *given[1:3], grid, torch.zeros(0).long(), mask)
        assert decoded.shape == (batch, heads, 0, 5)


@st.composite
def problems(draw):
    """A grid, mask, type and tensors of any strides."""
    grid = tuple(draw(st.tuples(*[st.integers(0, 6)] * 3)))
    radius = st.none() | st.integers(0, 4)
    mask = Mask3d(draw(st.sampled_from(NAMES)), draw(st.none() | st.tuples(radius, radius, radius)))
    shape = (draw(st.integers(0, 3)), draw(st.integers(1, 3)), length(grid), draw(st.integers(1, 40)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(_):
        """Dims in any order in memory, with gaps, some of them expanded."""
        perm, gap = draw(st.permutations(range(4))), draw(st.integers(1, 2))
        kept = [draw(st.booleans()) or draw(st.booleans()) for _ in range(4)]
        stored = [(shape[p] if kept[p] else min(1, shape[p])) * gap for p in perm]
        strided = torch.randn(stored, generator=generator).to(dtype)[(slice(None, None, gap),) * 4]
        return strided.permute([perm.index(d) for d in range(4)]).expand(shape)

    return grid, mask, [tensor(k) for k in range(4)]


def assert_close_as_sums(found, want, dtype):
    """Sums in a different order, of terms that may cancel: some thousand roundings of the working type; or, in half
    precision, a few of the result, as gradients are computed from one that was rounded."""
    eps, roundings = torch.finfo(dtype).eps, 16 if dtype.itemsize == 2 else 1024
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == theirs.dtype
        size = max([1.0, *theirs[theirs.isfinite()].abs().tolist()])
        torch.testing.assert_close(ours, theirs, rtol=4 * eps, atol=roundings * eps * size)


# One instruction set for all examples.
in_every_isa = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(problem=problems())
@in_every_isa
def test_any_grid_mask_and_stride(isa, problem):
    grid, mask, given = problem
    assert_close_as_sums(operator(*given, grid, mask), specification(*given, grid, mask), given[0].dtype)


# --- decoding --------------------------------------------------------------------------------------------------------


def cached(tensor, seen, positions):
    """The cache as a sampler holds it: whatever no query sees was never written."""
    cache = torch.full_like(tensor, math.nan)
    known = seen[positions].any(0)
    cache[:, :, known] = tensor[:, :, known]
    return cache


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_decode_gives_the_rows_of_the_whole(isa, poisoned, mask, dtype):
    ours, theirs, truth = [], [], []
    for seed, (grid, dim) in enumerate([((3, 4, 5), 8), ((1, 1, 1), 16), ((4, 7, 9), 32), ((2, 3, 7), 5)]):
        (q, k, v, _), whole, right = solved(grid, mask, dim, dtype, seed)
        L, generator = length(grid), torch.Generator().manual_seed(seed)
        for positions in (torch.tensor([L - 1]), torch.tensor([L // 2]), torch.randint(L, (5,), generator=generator)):
            caches = (cached(tensor, mask.visible(grid), positions) for tensor in (k, v))
            soil_memory()
            ours.append([masked_attention3d_decode(q[:, :, positions], *caches, grid, positions, mask)])
            assert ours[-1][0].dtype == dtype
            assert ours[-1][0].is_contiguous()
            theirs.append([whole[0][:, :, positions]])
            truth.append([right[0][:, :, positions]])
    assert_error_at_most_twice(ours, theirs, truth, dtype)


def test_decode_takes_every_position_in_any_order(isa):
    grid, mask = (3, 4, 5), Mask3d("separable")
    q, k, v = inputs(grid, 8, count=3)
    positions = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = masked_attention3d_decode(q[:, :, positions], k, v, grid, positions, mask, 0.3)
    want = masked_attention3d(q, k, v, grid, mask, 0.3)
    torch.testing.assert_close(found, want[:, :, positions])
    every_other = torch.arange(60)[::3]
    found = masked_attention3d_decode(q[:, :, ::3], k, v, grid, every_other, mask, 0.3)
    torch.testing.assert_close(found, want[:, :, ::3])


@pytest.mark.parametrize("case", strided_cases())
def test_decode_reads_caches_of_any_stride(isa, poisoned, case):
    q, k, v, _ = strided_cases()[case]
    positions, mask = torch.tensor([29, 3, 3, 17]), Mask3d("raster", (1, None, 2))
    want = reference.masked_attention3d_decode(q[:, :, positions], k, v, positions, STRIDED, mask, 6**-0.5)
    for queries in (q[:, :, positions], q[:, :, positions].mT.contiguous().mT):
        torch.testing.assert_close(masked_attention3d_decode(queries, k, v, STRIDED, positions, mask), want)


@given(data=st.data(), problem=problems())
@in_every_isa
def test_decode_anywhere(isa, data, problem):
    grid, mask, (q, k, v, _) = problem
    L = length(grid)
    positions = torch.tensor(
        data.draw(st.lists(st.integers(0, max(0, L - 1)), max_size=6 if L else 0)), dtype=torch.int64
    )
    want = specification(q, k, v, q, grid, mask)[0][:, :, positions]
    caches = (cached(tensor, mask.visible(grid), positions) for tensor in (k, v))
    found = masked_attention3d_decode(q[:, :, positions], *caches, grid, positions, mask)
    assert_close_as_sums([found], [want], q.dtype)


# --- repeatability and memory ----------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("mask", MASKS[::3], ids=str)
def test_result_does_not_depend_on_threads(isa, mask):
    grid = (5, 9, 11)
    given = inputs(grid, 24, 2, 3)
    positions = torch.arange(0, length(grid), 17)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            soil_memory()
            decoded = masked_attention3d_decode(given[0][:, :, positions], *given[1:3], grid, positions, mask)
            results.append((*operator(*given, grid, mask), decoded))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("mask", [Mask3d("raster"), Mask3d("eq6", (None, 5, 5))], ids=str)
def test_memory_beyond_inputs_and_outputs(mask):
    """Scores of all pairs would take 302 MB each time; the reference keeps to bounded memory where it stands in too."""
    grid = (12, 16, 16)
    given = inputs(grid, 16, 1, 8)
    operator(*(tensor[:, :, :256] for tensor in given), (1, 16, 16), mask)
    assert peak_of(lambda: operator(*given, grid, mask)) < 200 * 2**20
