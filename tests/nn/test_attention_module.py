"""MaskedAttention3d: the formula written out, cache against whole clips, axes, positions, and what it refuses."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vpfast.nn import MaskedAttention3d, sinusoidal_positions
from vpfast.ops import Mask3d

GRID = (3, 3, 4)
PLACES = 36
MASKS = [
    Mask3d(name, window)
    for name in ("raster", "raster_strict", "past_frames", "separable", "eq6")
    for window in (None, (1, None, 1))
]


def module(*arguments: Any, **options: Any) -> MaskedAttention3d:
    torch.manual_seed(0)
    return MaskedAttention3d(*arguments, **options).double()


def maps(batch: int = 2, dim: int = 12) -> Tensor:
    return torch.randn(batch, dim, *GRID, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rows(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B, T H W, C)."""
    return x.movedim(1, -1).flatten(1, 3)


def on_a_line(axis: int) -> Tensor:
    """Which positions lie on the line through another along one axis: (L, L)."""
    at = torch.cartesian_prod(*map(torch.arange, GRID))
    others = [other for other in range(3) if other != axis]
    return (at[:, None, others] == at[None, :, others]).all(-1)


def written_out(attention: MaskedAttention3d, x: Tensor) -> Tensor:
    """Every head as a softmax over what it sees, one after another."""
    x = rows(x)
    if attention.positions:
        x = x + sinusoidal_positions(GRID, attention.dim, torch.float64).flatten(0, 2)
    qkv = torch.nn.functional.linear(x, attention.qkv.weight, attention.qkv.bias)
    size, heads = attention.head_dim, []
    for head in range(attention.heads):
        q, k, v = (qkv[..., (part * attention.heads + head) * size :][..., :size] for part in range(3))
        seen = attention.mask.visible(GRID)
        if attention.axial:
            seen = seen & on_a_line(head % 3)
        scores = (q @ k.transpose(1, 2) / math.sqrt(size)).masked_fill(~seen, -math.inf)
        heads.append(scores.softmax(-1).nan_to_num(0) @ v)
    out = torch.nn.functional.linear(torch.cat(heads, -1), attention.output.weight, attention.output.bias)
    return out.unflatten(1, GRID).movedim(-1, 1)


@pytest.mark.parametrize("axial", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_it_is_the_formula(mask: Mask3d, axial: bool) -> None:
    attention = module(12, 4, 5, mask, axial)
    x = maps().requires_grad_()
    out = attention(x)
    expected = written_out(attention, x)
    torch.testing.assert_close(out, expected)
    # Of a softmax over nothing the written-out gradient is NaN; under these two rules a position sees itself.
    if mask.name in ("raster", "separable"):
        weight = torch.randn_like(out)
        wanted = [x, *attention.parameters()]
        for a, e in zip(
            torch.autograd.grad((out * weight).sum(), wanted),
            torch.autograd.grad((expected * weight).sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(a, e)


def order_of(mask: Mask3d) -> list[list[int]]:
    """Groups of positions that may be evaluated together, each after all that it sees."""
    frame = GRID[1] * GRID[2]
    if mask.name in ("separable", "eq6"):  # a skew of one position from frame to frame
        steps = range(frame + GRID[0] - 1)
        return [[t * frame + s - t for t in range(GRID[0]) if 0 <= s - t < frame] for s in steps]
    if mask.name == "past_frames":
        return [list(range(t * frame, (t + 1) * frame)) for t in range(GRID[0])]
    return [[place] for place in range(PLACES)]


@pytest.mark.parametrize("axial", [False, True])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_step_by_step_is_the_whole_clip(mask: Mask3d, axial: bool) -> None:
    """In the order of the mask, all positions of a group at once, out of caches that begin as NaN."""
    attention = module(12, 5, 3, mask, axial)
    x = maps()
    cache = attention.init_cache(2, GRID)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    got = torch.zeros(2, PLACES, 12, dtype=torch.float64)
    for group in order_of(mask):
        places = torch.tensor(group)
        got[:, places] = attention.extend(rows(x)[:, places], places, cache)
    torch.testing.assert_close(got, rows(attention(x)))


@given(cuts=st.lists(st.integers(0, PLACES), max_size=4), shuffle=st.randoms())
def test_any_number_of_positions_at_a_time(cuts: list[int], shuffle: Any) -> None:
    attention = module(12, mask="raster")
    x = maps()
    cache = attention.init_cache(2, GRID)
    got = torch.zeros(2, PLACES, 12, dtype=torch.float64)
    bounds = [0, *sorted(cuts), PLACES]
    for start, stop in itertools.pairwise(bounds):
        places = list(range(start, stop))
        shuffle.shuffle(places)
        index = torch.tensor(places, dtype=torch.int64)
        got[:, index] = attention.extend(rows(x)[:, index], index, cache)
    torch.testing.assert_close(got, rows(attention(x)))


def test_layouts_and_constructor() -> None:
    attention = module(12, 3)
    assert (attention.head_dim, attention.mask) == (4, Mask3d("raster"))
    assert set(attention.state_dict()) == {"qkv.weight", "qkv.bias", "output.weight", "output.bias"}
    assert set(MaskedAttention3d(12, bias=False).state_dict()) == {"qkv.weight", "output.weight"}
    assert "heads=3" in repr(attention)
    x = maps()
    out = attention(x)
    assert out.movedim(1, -1).is_contiguous()
    for view in (x.contiguous(memory_format=torch.channels_last_3d), x.repeat_interleave(2, 4)[..., ::2]):
        torch.testing.assert_close(attention(view), out, rtol=1e-12, atol=1e-12)
    assert attention(maps(batch=0)).shape == (0, 12, *GRID)
    assert attention.init_cache(0, GRID).keys.shape == (0, 3, PLACES, 4)


def test_positions_are_added_once_before_the_projection() -> None:
    with_positions, without = module(12, positions=True), module(12, positions=False)
    x = maps()
    added = x + sinusoidal_positions(GRID, 12, torch.float64).movedim(-1, 0)
    torch.testing.assert_close(with_positions(x), without(added))
    assert without.init_cache(2, GRID).positions is None


def test_half_precision_and_autocast() -> None:
    attention = MaskedAttention3d(12)
    x = maps().float()
    expected = attention(x)
    cache = attention.init_cache(2, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(x)
        step = attention.extend(rows(x), torch.arange(PLACES), cache)
    assert (out.dtype, step.dtype, cache.keys.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(step.float(), rows(expected), rtol=0.05, atol=0.05)
    half = attention.bfloat16()
    assert half(x.bfloat16()).dtype == half.init_cache(1, GRID).values.dtype == torch.bfloat16


@pytest.mark.parametrize("axial", [False, True])
def test_it_compiles_whole(axial: bool) -> None:
    attention = MaskedAttention3d(12, axial=axial)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = maps().float().requires_grad_()
    expected = attention(x)
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(x.grad, gradient)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"heads": 0}, ValueError, r"heads must be .* at least 1, got 0"),
        ({"heads": 13}, ValueError, r"12 channels do not share out among 13 heads; give head_dim"),
        ({"mask": "causal"}, ValueError, r"'causal' is unknown; choose one of 'raster'"),
        ({"mask": None}, TypeError, r"mask must be a vpfast.ops.Mask3d or the name of one, got None"),
    ],
)
def test_refused_when_built(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MaskedAttention3d(12, **arguments)


def test_refused_input() -> None:
    attention = module(12)
    cache = attention.init_cache(2, GRID)
    with pytest.raises(ValueError, match=r"\(B, 12, T, H, W\), got \(2, 11, 3, 3, 4\)"):
        attention(maps(dim=11))
    with pytest.raises(TypeError, match=r"float32 and the weights are torch.float64"):
        attention(maps().float())
    with pytest.raises(ValueError, match=r"grid must be \(T, H, W\), three positive integers, got \(3, 0, 4\)"):
        attention.init_cache(2, (3, 0, 4))
    with pytest.raises(ValueError, match=r"x \(2, n, 12\) and positions \(n,\) .* got \(2, 3, 12\) and \(2,\)"):
        attention.extend(rows(maps())[:, :3], torch.arange(2), cache)
    with pytest.raises(ValueError, match=r"got \(1, 36, 12\)"):
        attention.extend(rows(maps(batch=1)), torch.arange(36), cache)
    for step in (attention.extend, attention.keep):
        with pytest.raises(TypeError, match=r"the input is torch.float32 and the weights are torch.float64"):
            step(rows(maps())[:, :1].float(), torch.tensor([3]), cache)
        with pytest.raises(TypeError, match=r"takes a tensor \(2, n, 12\), got list"):
            step([1.0], torch.tensor([3]), cache)
    with pytest.raises(IndexError, match=r"index 36 is out of bounds .* size 36"):
        attention.extend(rows(maps())[:, :1], torch.tensor([36]), cache)
    with pytest.raises(TypeError, match=r"positions must be an int64 tensor, got torch.int32"):
        attention.extend(rows(maps())[:, :1], torch.tensor([3], dtype=torch.int32), cache)


@pytest.mark.parametrize("channels", [1, 2, 5, 6, 7, 64])
def test_positions_by_the_formula(channels: int) -> None:
    table = sinusoidal_positions(GRID, channels, torch.float64)
    assert table.shape == (*GRID, channels)
    steps = math.ceil(channels / 6)
    for channel in range(channels):
        pair = channel // 2
        wave = math.cos if channel % 2 else math.sin
        for at in ((0, 0, 0), (1, 2, 3), (2, 1, 0)):
            expected = wave(at[pair % 3] * 100 ** -(pair // 3 / steps))
            assert table[at][channel].item() == pytest.approx(expected, abs=1e-12)


def test_positions_tell_all_places_apart() -> None:
    table = sinusoidal_positions((30, 32, 32), 64).flatten(0, 2)
    assert (table.dtype, table.abs().max().item() <= 1) == (torch.float32, True)
    at = torch.cartesian_prod(*map(torch.arange, (30, 32, 32)))
    for place in (0, 12345, len(table) - 1):
        distance = (table - table[place]).square().sum(-1)
        distance[place] = math.inf
        assert (at[distance.argmin()] - at[place]).abs().sum() == 1
        assert distance.min() > 0.1


def test_positions_refuse() -> None:
    with pytest.raises(ValueError, match=r"grid must be \(T, H, W\).* got \(3, 4\)"):
        sinusoidal_positions((3, 4), 8)
    with pytest.raises(ValueError, match=r"grid must be \(T, H, W\).* got \(3, 4, 2\.5\)"):
        sinusoidal_positions((3, 4, 2.5), 8)  # type: ignore[arg-type]
    for channels in (0, 2.5):
        with pytest.raises(ValueError, match=f"channels must be .* at least 1, got {channels}"):
            sinusoidal_positions(GRID, channels)  # type: ignore[arg-type]
