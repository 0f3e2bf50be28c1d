"""MaskedConv3d: against a dense convolution with the rule written out tap by tap, layouts, and what it refuses."""

import itertools
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vpfast.nn import MaskedConv3d
from vpfast.nn.masked_conv3d import Conditioning, MaskKind

KINDS = list(itertools.product(get_args(Conditioning), get_args(MaskKind)))


def exists(conditioning: str, mask: str, t: int, y: int, x: int) -> bool:
    """Whether the tap t frames, y rows and x columns away from the centre is open."""
    before, here = (y, x) < (0, 0), (y, x) == (0, 0)
    if conditioning == "raster":
        return t < 0 or before or (here and mask == "B")
    if conditioning == "eq6":
        return (t < 0 and before) if mask == "A" else (before or here)
    return t < 0 or mask == "B"


def kernel_of(conv: MaskedConv3d) -> Tensor:
    """The dense kernel (out, in, kt, kh, kw) that the parameters stand for, differentiable in them."""
    times, height, width = conv.kernel_size
    dense = torch.zeros(conv.out_channels, conv.in_channels, times, height, width, dtype=torch.float64)
    for k in range(times):
        offsets = [(y, x) for y in range(height) for x in range(width)]
        t = k - (times - 1)
        kept = [o for o in offsets if exists(conv.conditioning, conv.mask, t, o[0] - height // 2, o[1] - width // 2)]
        for tap, (y, x) in enumerate(kept):
            weight = conv.present[:, :, tap] if t == 0 else conv.past[:, :, k, tap]
            one = torch.zeros_like(dense)
            one[:, :, k, y, x] = 1
            dense = dense + one * weight[:, :, None, None, None]
        given = conv.present if t == 0 else conv.past
        assert len(kept) == (0 if given is None else given.shape[-1])
    return dense


def dense(conv: MaskedConv3d, x: Tensor) -> Tensor:
    times, height, width = conv.kernel_size
    padded = F.pad(x, (width // 2, width // 2, height // 2, height // 2, times - 1, 0))
    return F.conv3d(padded, kernel_of(conv), conv.bias)


@pytest.mark.parametrize(("conditioning", "mask"), KINDS)
@given(
    kernel=st.tuples(st.integers(1, 3), st.sampled_from((1, 3, 5)), st.sampled_from((1, 3, 5))),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
    bias=st.booleans(),
)
def test_it_is_the_dense_convolution_with_its_mask(
    conditioning: Conditioning,
    mask: MaskKind,
    kernel: tuple[int, int, int],
    grid: tuple[int, int, int],
    batch: int,
    bias: bool,
) -> None:
    """Values and all gradients, in float64."""
    torch.manual_seed(0)
    if not any(exists(conditioning, mask, *offset) for offset in offsets_of(kernel)):
        with pytest.raises(ValueError, match="no tap"):
            MaskedConv3d(2, 3, kernel, mask, conditioning, bias)
        return
    conv = MaskedConv3d(2, 3, kernel, mask, conditioning, bias).double()
    x = torch.randn(batch, 2, *grid, dtype=torch.float64, requires_grad=True)
    out, expected = conv(x), dense(conv, x)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    wanted = [x, *conv.parameters()]
    # In a clip too short for some taps those have no part in what is computed; the 0 gives them one.
    actual = torch.autograd.grad((out * weight).sum() + sum(0 * tensor.sum() for tensor in wanted), wanted)
    for a, e in zip(actual, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(a, e)


def offsets_of(kernel: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    times, height, width = kernel
    rows, columns = range(-(height // 2), height // 2 + 1), range(-(width // 2), width // 2 + 1)
    return list(itertools.product(range(1 - times, 1), rows, columns))


@pytest.mark.parametrize("conditioning", get_args(Conditioning))
def test_one_a_and_many_bs_never_leak_and_see_all_within_reach(conditioning: Conditioning) -> None:
    """The gradient of the output at one place is nonzero exactly where repeated taps of the rule lead."""
    torch.manual_seed(0)
    grid = (3, 4, 5)
    convs = [MaskedConv3d(2, 2, (2, 3, 3), mask, conditioning).double() for mask in ("A", "B", "B")]  # type: ignore[arg-type]
    places = list(itertools.product(*map(range, grid)))
    reached = torch.eye(len(places), dtype=torch.bool)
    for conv in convs:
        step = torch.tensor(
            [
                [
                    max(abs(y - v), abs(x - w)) <= 1
                    and t - u in (0, 1)
                    and exists(conditioning, conv.mask, u - t, v - y, w - x)
                    for u, v, w in places
                ]
                for t, y, x in places
            ]
        )
        reached = (step.float() @ reached.float()) > 0
    x = torch.randn(len(places), 2, *grid, dtype=torch.float64, requires_grad=True)
    out = convs[2](convs[1](convs[0](x))).flatten(2)
    out.diagonal(dim1=0, dim2=2).square().sum().backward()
    torch.testing.assert_close(x.grad.flatten(2).abs().sum(1) > 0, reached)
    own = torch.arange(len(places))
    frame = own // 20
    before = {
        "raster": own < own[:, None],
        "eq6": (frame < frame[:, None]) & (own % 20 < own[:, None] % 20),
        "past_frames": frame < frame[:, None],
    }[conditioning]
    assert not (reached & ~before).any()


def test_any_layout_goes_in_and_position_major_comes_out() -> None:
    torch.manual_seed(0)
    conv = MaskedConv3d(4, 6).double()
    x = torch.randn(2, 4, 3, 5, 7, dtype=torch.float64)
    expected = conv(x)
    sliced = torch.randn(2, 4, 3, 5, 14, dtype=torch.float64)
    sliced[..., ::2] = x
    for view in (
        x.contiguous(memory_format=torch.channels_last_3d),
        sliced[..., ::2],
        x.transpose(3, 4).contiguous().transpose(3, 4),
    ):
        out = conv(view)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        assert out.movedim(1, -1).is_contiguous()
    one = x[:1, :, :1, :1, :1].expand(2, 4, 3, 5, 7)
    torch.testing.assert_close(conv(one), conv(one.clone()), rtol=0, atol=0)


def test_position_major_input_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, seen = MaskedConv3d(4, 6), []
    taps = conv.frame_taps

    def watched(frames: Tensor, lag: int, bias: Tensor | None = None) -> Tensor:
        seen.append(frames.data_ptr())
        return taps(frames, lag, bias)

    monkeypatch.setattr(conv, "frame_taps", watched)
    x = torch.randn(1, 3, 5, 7, 4).movedim(-1, 1)
    conv(x)
    assert seen == [x.data_ptr()] * 2


def test_the_two_parts_add_up() -> None:
    torch.manual_seed(0)
    conv = MaskedConv3d(2, 3, (3, 3, 3)).double()
    x = torch.randn(2, 2, 4, 5, 6, dtype=torch.float64)
    still = x.clone()
    still[:, :, 2] += 1
    torch.testing.assert_close(conv.from_past(still)[:, :, :3], conv.from_past(x)[:, :, :3], rtol=0, atol=0)
    torch.testing.assert_close(conv.from_present(still)[:, :, 3], conv.from_present(x)[:, :, 3], rtol=0, atol=0)
    torch.testing.assert_close(conv.from_present(still) + conv.from_past(still), conv(still), rtol=0, atol=0)
    lag2 = conv.frame_taps(x[:, :, 0], 2) + conv.frame_taps(x[:, :, 1], 1)
    torch.testing.assert_close(lag2, conv.from_past(x)[:, :, 2])


@pytest.mark.parametrize(("conditioning", "mask"), KINDS)
def test_parameters_are_the_open_taps_alone(conditioning: Conditioning, mask: MaskKind) -> None:
    conv = MaskedConv3d(4, 6, mask=mask, conditioning=conditioning)
    open_taps = sum(exists(conditioning, mask, *offset) for offset in offsets_of((2, 3, 3)))
    assert sum(p.numel() for p in conv.parameters()) == 4 * 6 * open_taps + 6
    assert ("present" in conv.state_dict()) == (mask == "B" or conditioning == "raster")
    assert conv.past.shape[:3] == (6, 4, 1)
    for parameter in conv.parameters():
        assert 0 < parameter.abs().max() <= (4 * open_taps) ** -0.5


def test_types_batches_and_short_clips() -> None:
    conv = MaskedConv3d(2, 3, (4, 3, 3))
    assert conv(torch.rand(0, 2, 5, 4, 4)).shape == (0, 3, 5, 4, 4)
    assert conv(torch.rand(2, 2, 1, 1, 1)).shape == (2, 3, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.rand(1, 2, 5, 4, 4)).dtype == torch.bfloat16
    assert conv.bfloat16()(torch.rand(1, 2, 5, 4, 4).bfloat16()).dtype == torch.bfloat16
    assert "conditioning='raster'" in repr(conv)


def test_it_compiles_whole() -> None:
    conv = MaskedConv3d(2, 3)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 2, 3, 4, 5), (1, 2, 4, 5, 6)):
        x = torch.rand(shape)
        torch.testing.assert_close(compiled(x), conv(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 3}, r"kernel_size must be \(kt, kh, kw\), got 3"),
        ({"kernel_size": (2, 2, 3)}, r"kernel_height must be odd.*got 2"),
        ({"kernel_size": (0, 3, 3)}, r"kernel_frames must be .* at least 1, got 0"),
        ({"mask": "C"}, r"mask must be one of 'A', 'B', got 'C'"),
        ({"conditioning": "future"}, r"conditioning must be one of 'raster', 'eq6', 'past_frames', got 'future'"),
        ({"in_channels": 0}, r"in_channels must be .* at least 1, got 0"),
        ({"kernel_size": (1, 3, 3), "mask": "A", "conditioning": "eq6"}, r"no tap of kernel_size \(1, 3, 3\) is left"),
    ],
)
def test_refused_when_built(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedConv3d(**{"in_channels": 2, "out_channels": 3, **arguments})


def test_refused_maps() -> None:
    conv = MaskedConv3d(2, 3)
    with pytest.raises(TypeError, match=r"\(B, 2, T, H, W\), got list"):
        conv([1.0])
    with pytest.raises(ValueError, match=r"\(B, 2, T, H, W\), got \(1, 3, 2, 4, 4\)"):
        conv(torch.rand(1, 3, 2, 4, 4))
    with pytest.raises(ValueError, match=r"at least one frame, row and column, got \(1, 2, 0, 4, 4\)"):
        conv(torch.rand(1, 2, 0, 4, 4))
    with pytest.raises(TypeError, match=r"float64 and the weights are torch.float32"):
        conv(torch.rand(1, 2, 2, 4, 4).double())
    with pytest.raises(ValueError, match=r"the input is on meta"):
        conv(torch.rand(1, 2, 2, 4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"no taps at lag 0"):
        MaskedConv3d(2, 3, mask="A", conditioning="eq6").frame_taps(torch.rand(1, 2, 4, 4), 0)
    for lag in (-1, 3):
        with pytest.raises(ValueError, match=rf"kernel_size \(3, 3, 3\).* has no taps at lag {lag}"):
            MaskedConv3d(2, 3, kernel_size=(3, 3, 3)).frame_taps(torch.rand(1, 2, 4, 4), lag)
