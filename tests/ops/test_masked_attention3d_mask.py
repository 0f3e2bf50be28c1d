"""The masks of masked_attention3d, as rules, values and drawings, and what the operators refuse."""

import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
from attention import MASKS, NAMES, inputs, native, options

import vpfast
from vpfast.ops import Mask3d, masked_attention3d, masked_attention3d_decode

README = Path(vpfast.__file__).parent / "ops" / "masked_attention3d" / "README.md"


# --- rules -----------------------------------------------------------------------------------------------------------


def is_visible(name, window, query, key, width):
    """Whether a query (t, y, x) sees a key, spelled out case by case."""
    (t, y, x), (tk, yk, xk) = query, key
    j, jk = y * width + x, yk * width + xk
    if window is not None:
        for radius, one, other in zip(window, query, key, strict=True):
            if radius is not None and abs(one - other) > radius:
                return False
    if name == "raster":
        return tk < t or (tk == t and jk <= j)
    if name == "raster_strict":
        return tk < t or (tk == t and jk < j)
    if name == "past_frames":
        return tk < t
    if name == "separable":
        return tk <= t and jk <= j
    assert name == "eq6"
    return tk < t and jk < j


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_visible_is_the_rule(mask):
    for grid in ((3, 2, 4), (4, 3, 1), (1, 1, 5), (2, 5, 2)):
        places = list(itertools.product(*map(range, grid)))
        want = torch.tensor([[is_visible(mask.name, mask.window, q, k, grid[2]) for k in places] for q in places])
        assert torch.equal(mask.visible(grid), want)
        some = torch.tensor([4, 0, 3, 3])
        assert torch.equal(mask.visible(grid, some), want[some])


def test_nothing_is_visible_in_an_empty_grid():
    for grid in ((0, 2, 3), (2, 0, 3), (2, 3, 0)):
        assert Mask3d("raster", (1, 1, 1)).visible(grid).shape == (0, 0)


def test_no_mask_shows_what_comes_after():
    for mask in MASKS:
        assert not mask.visible((3, 3, 4)).triu(1).any()


def test_masks_are_values():
    assert Mask3d("eq6", (1, None, 2)) == Mask3d("eq6", [1, None, 2]) != Mask3d("eq6", (1, 0, 2))
    assert Mask3d("eq6", (None, None, None)) == Mask3d("eq6") != Mask3d("separable")
    assert len({Mask3d(mask.name, mask.window) for mask in MASKS * 2}) == len(MASKS)
    for mask in MASKS:
        assert pickle.loads(pickle.dumps(mask)) == eval(repr(mask)) == Mask3d.of_radii(mask.name, mask.radii) == mask
    with pytest.raises(AttributeError):
        MASKS[0].name = "eq6"


# --- the README ------------------------------------------------------------------------------------------------------


def drawing(mask, grid, query):
    """The lines of a picture: frames beside each other, seen, hidden, and the query."""
    T, H, W = grid
    place = (query[0] * H + query[1]) * W + query[2]
    cells = ["#" if seen else "." for seen in mask.visible(grid, torch.tensor([place]))[0]]
    cells[place] = "@" if cells[place] == "#" else "?"
    rows = ["".join(cells[start : start + W]) for start in range(0, T * H * W, W)]
    return ["   ".join(rows[y::H]) for y in range(H)]


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_draws_every_mask(name):
    pairs = zip(*(drawing(Mask3d(name, window), (3, 3, 5), (2, 1, 2)) for window in (None, (1, 1, 1))), strict=True)
    lines = [f"    {name if y == 1 else '':<15}{whole}          {near}" for y, (whole, near) in enumerate(pairs)]
    assert "\n".join(lines) in README.read_text()


def test_the_readme_counts_the_visible_pairs():
    for T, N in ((4, 6), (1, 12), (5, 1)):
        L = T * N
        counts = {
            "raster": L * (L + 1) // 2,
            "raster_strict": L * (L - 1) // 2,
            "past_frames": N**2 * T * (T - 1) // 2,
            "separable": T * (T + 1) // 2 * (N * (N + 1) // 2),
            "eq6": T * (T - 1) // 2 * (N * (N - 1) // 2),
        }
        assert {name: Mask3d(name).visible((T, 1, N)).sum().item() for name in NAMES} == counts


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window", [5, "abc", (1, 2), (1, 2, 3, 4), (1, -1, 2), (1.5, None, 2), (1, "2", 3), torch.ones(3)]
)
def test_wrong_windows(window):
    with pytest.raises(ValueError, match=r"window must be three radii \(t, y, x\), each an int >= 0 or None .*, got "):
        Mask3d("raster", window)


def test_unknown_mask():
    with pytest.raises(ValueError, match=r"name 'causal' is unknown; choose one of 'raster', .*, 'eq6'"):
        Mask3d("causal")


F, G = torch.zeros, (2, 3, 4)
A = F(2, 3, 24, 8)
RASTER = Mask3d("raster")


@pytest.mark.parametrize("op", [masked_attention3d, masked_attention3d_decode])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"mask": "raster"}, TypeError, r"mask must be a vpfast.ops.Mask3d, such as Mask3d\('raster'\), got 'raster'"),
        ({"mask": None}, TypeError, "mask must be .*, got None"),
        ({"mask": torch.ones(24, 24)}, TypeError, "mask must be a vpfast.ops.Mask3d"),
        ({"grid": (6, 4)}, ValueError, r"grid must be three sizes \(T, H, W\), each an int >= 0, got \(6, 4\)"),
        ({"grid": 24}, ValueError, "grid must be .*, got 24"),
        ({"grid": (2, -3, -4)}, ValueError, r"got \(2, -3, -4\)"),
        ({"grid": (2.0, 3, 4)}, ValueError, r"got \(2.0, 3, 4\)"),
        ({"grid": "234"}, ValueError, "got '234'"),
        ({"scale": math.inf}, ValueError, r"scale must be a finite number, or None for d\^-0.5, got inf"),
        ({"scale": math.nan}, ValueError, "got nan"),
        ({"scale": "1"}, ValueError, "got '1'"),
        ({"scale": torch.ones(())}, ValueError, r"got tensor\(1.\)"),
        ({"q": A.int()}, TypeError, "q must be float64, float32, float16 or bfloat16, got torch.int32"),
        ({"k": A.bool()}, TypeError, "k must be .*, got torch.bool"),
        ({"k": A.double()}, TypeError, r"k must have the type of q \(torch.float32\), got torch.float64; convert one"),
        ({"v": A.half()}, TypeError, "v must have the type of q .* got torch.float16"),
        ({"v": A.to("meta")}, ValueError, "q is on cpu and v on meta; move one of them"),
        ({"k": A[:, :2]}, ValueError, r"k must .*\(2, 3, 24, 8\).*, got \(2, 2, 24, 8\)"),
        ({"v": A[..., :7]}, ValueError, r"v must .*\(2, 3, 24, 8\).*, got \(2, 3, 24, 7\)"),
        ({"v": A[0]}, ValueError, r"v must .*, got \(3, 24, 8\)"),
        ({"q": A[0]}, ValueError, r"q must be \(B, heads, .*, d\) with d at least 1.*, got \(3, 24, 8\)"),
        ({"q": A[..., :0]}, ValueError, r"got \(2, 3, 24, 0\)"),
    ],
)
def test_refusals_name_what_was_given(op, changed, error, message):
    given = {"q": A, "k": A, "v": A, "grid": G, "mask": RASTER, **changed}
    if op is masked_attention3d_decode:
        given["positions"] = torch.arange(24)
    with pytest.raises(error, match=rf"^{op.__name__}: .*{message}"):
        op(**given)


def test_a_grid_of_another_size():
    with pytest.raises(ValueError, match=r"the grid \(2, 3, 5\) has 30 positions, got \(2, 3, 24, 8\)"):
        masked_attention3d(A, A, A, (2, 3, 5), RASTER)
    cache = r"\(B, heads, T H W, d\) = \(2, 3, 30, 8\) for q \(2, 3, 1, 8\) and the grid \(2, 3, 5\)"
    with pytest.raises(ValueError, match=rf"k must be {cache}, got \(2, 3, 24, 8\)"):
        masked_attention3d_decode(A[:, :, :1], A, A, (2, 3, 5), torch.tensor([0]), RASTER)


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        (3, TypeError, "positions must be an int64 tensor, got int"),
        (torch.tensor([0, 1]).int(), TypeError, "positions must be an int64 tensor, got torch.int32"),
        (torch.tensor([0.0, 1.0]), TypeError, "got torch.float32"),
        (torch.tensor([0, 1], device="meta"), ValueError, "q is on cpu and positions on meta"),
        (torch.tensor([0]), ValueError, r"positions must be \(2,\), one a query of q \(2, 3, 2, 8\), got \(1,\)"),
        (torch.tensor([[0, 1]]), ValueError, r"got \(1, 2\)"),
        (torch.tensor([0, 24]), ValueError, r"positions must lie in 0..23, raster positions of the grid, got 0..24"),
        (torch.tensor([-1, 7]), ValueError, r"got -1..7"),
    ],
)
def test_wrong_positions(positions, error, message):
    with pytest.raises(error, match=rf"^masked_attention3d_decode: .*{message}"):
        masked_attention3d_decode(A[:, :, :2], A, A, G, positions, RASTER)


@native
def test_the_kernel_itself_refuses_what_would_read_beyond_memory():
    q, k, v, grad = inputs(G, 8)
    operators, rules = torch.ops.vpfast, options(q, G, RASTER)
    out, lse = operators.masked_attention3d(q, k, v, *rules)
    short, narrow, half = (tensor.clone() for tensor in (q[:, :, :23], q[..., :7], q.half()))
    for wrong in (short, narrow, half, q[:1], q[:, :1], q[0]):
        for given in ((wrong, k, v), (q, wrong, v), (q, k, wrong)):
            with pytest.raises(RuntimeError, match="must be"):
                operators.masked_attention3d(*given, *rules)
        for place in range(5):
            given = [grad, q, k, v, out]
            given[place] = wrong
            with pytest.raises(RuntimeError, match="must be"):
                operators.masked_attention3d_backward(*given, lse, *rules)
        with pytest.raises(RuntimeError, match="must be"):
            operators.masked_attention3d_decode(q[:, :, :2], wrong, v, torch.tensor([0, 1]), *rules)
    for wrong in (lse[:, :, :23], lse.double(), lse[0]):
        with pytest.raises(RuntimeError, match="lse must be"):
            operators.masked_attention3d_backward(grad, q, k, v, out, wrong, *rules)
    for wrong in (torch.tensor([0, 24]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0, 1]).int()):
        with pytest.raises(RuntimeError, match=r"outside the grid|positions must be"):
            operators.masked_attention3d_decode(q[:, :, :2], k, v, wrong, *rules)
    for grid, name, window in (((2, 12), "raster", (1, 1, 1)), (G, "causal", (1, 1, 1)), (G, "raster", (1, 1))):
        with pytest.raises(RuntimeError, match=r"three numbers|no mask 'causal'"):
            operators.masked_attention3d(q, k, v, grid, name, window, 1.0)
