"""The recurrent cells: against the equations written out, as drop-ins, and in what they refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vpfast.nn import ConvLSTMCell, EDLSTMCell, EncLSTMDecCell
from vpfast.nn.bottleneck import Bottleneck


def cells() -> list[nn.Module]:
    return [ConvLSTMCell(3, 5, 3), EDLSTMCell(3, 5, (4, 6, 8)), EncLSTMDecCell(3, 5, (4, 6, 8))]


def test_convlstm_is_the_textbook_cell() -> None:
    torch.manual_seed(0)
    cell = ConvLSTMCell(3, 5, (3, 5)).double()
    x, h, c = (torch.randn(2, n, 6, 7, dtype=torch.float64) for n in (3, 5, 5))
    i, f, o, g = F.conv2d(torch.cat((x, h), 1), cell.conv.weight, cell.conv.bias, padding=(1, 2)).chunk(4, 1)
    c_expected = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h_expected = o.sigmoid() * c_expected.tanh()
    out, (h_new, c_new) = cell(x, (h, c))
    assert out is h_new
    torch.testing.assert_close(c_new, c_expected)
    torch.testing.assert_close(h_new, h_expected)


def test_convlstm_constructor_and_parameters() -> None:
    assert ConvLSTMCell(3, 5, 3, True).conv.bias is not None
    assert ConvLSTMCell(3, 5, 3, False).conv.bias is None
    assert set(ConvLSTMCell(3, 5, 3).state_dict()) == {"conv.weight", "conv.bias"}
    assert ConvLSTMCell(3, 5, (1, 3)).conv.weight.shape == (20, 8, 1, 3)
    with pytest.raises(ValueError, match=r"kernel_size must be odd and positive.*4"):
        ConvLSTMCell(3, 5, 4)


def bottleneck(x: Tensor, block: Bottleneck) -> Tensor:
    w = dict(block.named_parameters())
    y = F.leaky_relu(F.conv2d(x, w["body.0.weight"], w["body.0.bias"], padding=1), 0.01)
    y = F.conv2d(y, w["body.2.weight"], w["body.2.bias"], padding=1)
    return F.leaky_relu(y + F.conv2d(x, w["skip.0.weight"], w["skip.0.bias"]), 0.01)


def test_edlstm_follows_the_paper_step_by_step() -> None:
    """One step with a shared feature, written out stage by stage for a two-stage codec."""
    torch.manual_seed(0)
    cell = EDLSTMCell(3, 5, (4, 6, 8), shared_channels=7).double()
    x, h, c = (torch.randn(2, n, 8, 12, dtype=torch.float64) for n in (3, 5, 5))
    shared = torch.randn(2, 7, 2, 3, dtype=torch.float64)

    def up(t: Tensor) -> Tensor:
        return F.interpolate(t, size=(2 * t.shape[2], 2 * t.shape[3]), mode="bilinear", align_corners=True)

    e0, e1 = cell.encoder.stages
    skip0 = F.leaky_relu(cell.encoder.stem(torch.cat((x, h), 1)), 0.01)
    skip1 = bottleneck(F.max_pool2d(bottleneck(skip0, e0.before), 2), e0.after)
    v = bottleneck(F.max_pool2d(bottleneck(skip1, e1.before), 2), e1.after)
    v = F.leaky_relu(F.conv2d(torch.cat((v, shared), 1), cell.share.weight, padding=1), 0.01)
    d0, d1 = cell.decoder.stages
    y = F.relu(d0.merge(torch.cat((bottleneck(up(bottleneck(v, d0.before)), d0.after), skip1), 1)))
    gates = d1.merge(torch.cat((bottleneck(up(bottleneck(y, d1.before)), d1.after), skip0), 1))
    i, f, o, g = gates.chunk(4, 1)
    c_expected = f.sigmoid() * c + i.sigmoid() * g.tanh()

    (h_new, c_new), feature = cell.step(x, (h, c), shared)
    torch.testing.assert_close(feature, v)
    torch.testing.assert_close(c_new, c_expected)
    torch.testing.assert_close(h_new, o.sigmoid() * c_expected.tanh())
    assert cell.share.bias is None


def test_widening_after_the_pool_moves_the_wider_bottleneck() -> None:
    before = EDLSTMCell(3, 5, (4, 6)).encoder.stages[0]
    after = EDLSTMCell(3, 5, (4, 6), widen="after_pool").encoder.stages[0]
    assert before.before.body[0].weight.shape[:2] == (6, 4)
    assert before.after.body[0].weight.shape[:2] == (6, 6)
    assert after.before.body[0].weight.shape[:2] == (4, 4)
    assert after.after.body[0].weight.shape[:2] == (6, 4)


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: type(cell).__name__)
def test_any_cell_takes_the_place_of_another(cell: nn.Module) -> None:
    """No state is a state of zeros; h, c go in as they came out; gradients reach every parameter over two steps."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 12)
    out, state = cell(x)
    zeros = tuple(torch.zeros_like(s) for s in state)
    torch.testing.assert_close(cell(x, zeros)[0], out, rtol=0, atol=0)
    out, _ = cell(x, state)
    assert out.shape == (2, 5, 8, 12)
    out.square().sum().backward()
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: type(cell).__name__)
def test_half_precision_keeps_the_cell_state_in_float32(cell: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out, (h, c) = cell(x)
        out, (h, c) = cell(x, (h, c))
    assert (out.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    out, (h, c) = cell.bfloat16()(x.bfloat16())
    assert (out.dtype, h.dtype, c.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: type(cell).__name__)
def test_channels_last_is_kept(cell: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 12)
    expected, _ = cell(x, cell(x)[1])
    cell.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    out, state = cell(x, cell(x)[1])
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (out, *state))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2))
def test_any_size_that_divides(batch: int, rows: int, columns: int, depth: int) -> None:
    cell = EDLSTMCell(2, 3, (2, 3, 4, 5)[: depth + 2])
    size = (rows * cell.factor, columns * cell.factor)
    out, (h, c) = cell(torch.randn(batch, 2, *size))
    assert out.shape == h.shape == c.shape == (batch, 3, *size)


@pytest.mark.parametrize("cell", cells()[1:], ids=lambda cell: type(cell).__name__)
def test_refused_sizes(cell: nn.Module) -> None:
    with pytest.raises(ValueError, match="height is a positive multiple of 4, got 10"):
        cell(torch.zeros(1, 3, 10, 12))
    with pytest.raises(ValueError, match="width is a positive multiple of 4, got 6"):
        cell(torch.zeros(1, 3, 8, 6))
    with pytest.raises(ValueError, match="height is a positive multiple of 4, got 0"):
        cell(torch.zeros(1, 3, 0, 8))


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: type(cell).__name__)
def test_refused_maps(cell: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 8, 8\)"):
        cell(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(3, 8, 8\)"):
        cell(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match=r"the input is torch\.uint8 and the weights are torch\.float32"):
        cell(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"the input is torch\.float64"):
        cell(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="the input is on meta and the weights on cpu"):
        cell(torch.zeros(1, 3, 8, 8, device="meta"))
    with pytest.raises(TypeError, match="got list"):
        cell([])


def test_refused_constructions_and_features() -> None:
    with pytest.raises(ValueError, match=r"at least two positive integers, got \(8,\)"):
        EDLSTMCell(3, 5, (8,))
    with pytest.raises(ValueError, match=r"input_kernel_size must be odd.*got 4"):
        EDLSTMCell(3, 5, input_kernel_size=4)
    with pytest.raises(ValueError, match=r"at least two positive integers, got \(8,\)"):
        EncLSTMDecCell(3, 5, (8,))
    with pytest.raises(ValueError, match=r"output_kernel_size must be odd.*got 2"):
        EncLSTMDecCell(3, 5, output_kernel_size=2)
    with pytest.raises(ValueError, match="shared_channels=0"):
        EDLSTMCell(3, 5, (4, 6))(torch.zeros(1, 3, 8, 8), None, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="every step needs the shared feature"):
        EDLSTMCell(3, 5, (4, 6), shared_channels=2)(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: type(cell).__name__)
@pytest.mark.parametrize("which", [0, 1], ids=["h", "c"])
def test_refused_states(cell: nn.Module, which: int) -> None:
    """Each half of the state alone is wrong in one way, and the error names it."""
    x = torch.zeros(2, 3, 8, 12)
    good = cell(x)[1]
    batch, channels, height, width = good[0].shape
    name = "hc"[which]
    wrong = [
        (torch.zeros(1, channels, height, width), ValueError, r"must have shape .* got \(1, "),
        (torch.zeros(batch, channels + 1, height, width), ValueError, rf"got \(2, {channels + 1}, "),
        (torch.zeros(batch, channels, height, 1), ValueError, "must have shape"),
        (good[which].double(), TypeError, r"is torch\.float64, which does not go with torch\.float32 maps"),
        (good[which].long(), TypeError, r"is torch\.int64"),
        (good[which].to("meta"), ValueError, "is on meta and the input on cpu"),
        (None, TypeError, "must be a tensor of shape .*got NoneType"),
    ]
    for value, error, message in wrong:
        state = (value, good[1]) if which == 0 else (good[0], value)
        with pytest.raises(error, match=rf"{type(cell).__name__}: {name} .*{message}"):
            cell(x, state)


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: type(cell).__name__)
def test_a_state_is_a_pair(cell: nn.Module) -> None:
    """An empty tuple is no state, and not the same as None."""
    x = torch.zeros(2, 3, 8, 12)
    for state, found in (((), "0 of them"), ((x,), "1 of them"), (x, "Tensor")):
        with pytest.raises(TypeError, match=rf"the pair \(h, c\).*got {found}"):
            cell(x, state)


@pytest.mark.parametrize(
    ("shared", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4), ValueError, r"shape \(2, 2, 4, 4\).*got \(2, 3, 4, 4\)"),
        (torch.zeros(2, 2, 8, 4), ValueError, r"got \(2, 2, 8, 4\)"),
        (torch.zeros(1, 2, 4, 4), ValueError, r"got \(1, 2, 4, 4\)"),
        (torch.zeros(2, 2, 4, 4).double(), TypeError, r"is torch\.float64"),
        (torch.zeros(2, 2, 4, 4, device="meta"), ValueError, "is on meta"),
    ],
)
def test_refused_shared_features(shared: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"EDLSTMCell: shared {message}" if error is TypeError else rf"shared .*{message}"):
        EDLSTMCell(3, 5, (4, 6), shared_channels=2)(torch.zeros(2, 3, 8, 8), None, shared)


@pytest.mark.parametrize("kernel_size", [(3,), (3, 3, 3), 0, -1, (3, 2), (3, 0), 3.0, True])
def test_refused_kernels(kernel_size: Any) -> None:
    with pytest.raises(ValueError, match=r"ConvLSTMCell: kernel_size must be .*got"):
        ConvLSTMCell(3, 5, kernel_size)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConvLSTMCell(3, 0, 3), "ConvLSTMCell: hidden_channels must be an integer of at least 1, got 0"),
        (lambda: ConvLSTMCell(3, 5, 3, gate_order="abcd"), "permutation of 'fiog', got 'abcd'"),
        (lambda: EDLSTMCell(3, 0), "EDLSTMCell: hidden_channels must be an integer of at least 1, got 0"),
        (lambda: EDLSTMCell(0, 5), "in_channels must be an integer of at least 1, got 0"),
        (lambda: EDLSTMCell(3, 5, (4, 0)), r"at least two positive integers, got \(4, 0\)"),
        (lambda: EDLSTMCell(3, 5, shared_channels=-2), "shared_channels must be an integer of at least 0, got -2"),
        (lambda: EDLSTMCell(3, 5, input_kernel_size=-1), "input_kernel_size must be odd and positive.*got -1"),
        (lambda: EDLSTMCell(3, 5, gate_order="abcd"), "permutation of 'fiog', got 'abcd'"),
        (lambda: EDLSTMCell(3, 5, widen="foo"), "'before_pool', 'after_pool', got 'foo'"),
        (lambda: EncLSTMDecCell(3, 0), "out_channels must be an integer of at least 1, got 0"),
        (lambda: EncLSTMDecCell(3, 5, (4, 0)), r"at least two positive integers, got \(4, 0\)"),
        (lambda: EncLSTMDecCell(3, 5, gate_order="abcd"), "permutation of 'fiog', got 'abcd'"),
        (lambda: EncLSTMDecCell(3, 5, widen="foo"), "'before_pool', 'after_pool', got 'foo'"),
        (lambda: EncLSTMDecCell(3, 5, output_kernel_size=0), "output_kernel_size must be odd and positive.*got 0"),
    ],
)
def test_refused_options(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: type(cell).__name__)
def test_compiles_and_exports_with_a_state(cell: nn.Module) -> None:
    """The checks break no graph."""
    x = torch.randn(2, 3, 8, 12)
    state = cell(x)[1]
    expected = cell(x, state)
    torch.testing.assert_close(torch.compile(cell, fullgraph=True, backend="aot_eager")(x, state), expected)
    torch.testing.assert_close(torch.export.export(cell, (x, state)).module()(x, state), expected)
