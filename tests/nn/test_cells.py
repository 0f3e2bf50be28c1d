"""The recurrent cells: against the equations written out, as drop-ins, and in what they refuse."""

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
    with pytest.raises(ValueError, match=r"kernel_size must be odd.*4"):
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
    with pytest.raises(ValueError, match="height 10 is not a multiple of 4"):
        cell(torch.zeros(1, 3, 10, 12))
    with pytest.raises(ValueError, match="width 6 is not a multiple of 4"):
        cell(torch.zeros(1, 3, 8, 6))


@pytest.mark.parametrize("cell", cells(), ids=lambda cell: type(cell).__name__)
def test_refused_maps(cell: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 4, 8, 8\)"):
        cell(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(3, 8, 8\)"):
        cell(torch.zeros(3, 8, 8))


def test_refused_constructions_and_features() -> None:
    with pytest.raises(ValueError, match=r"at least two widths, got \(8,\)"):
        EDLSTMCell(3, 5, (8,))
    with pytest.raises(ValueError, match="input_kernel_size must be odd, got 4"):
        EDLSTMCell(3, 5, input_kernel_size=4)
    with pytest.raises(ValueError, match=r"at least two widths, got \(8,\)"):
        EncLSTMDecCell(3, 5, (8,))
    with pytest.raises(ValueError, match="output_kernel_size must be odd, got 2"):
        EncLSTMDecCell(3, 5, output_kernel_size=2)
    with pytest.raises(ValueError, match="shared_channels=0"):
        EDLSTMCell(3, 5, (4, 6))(torch.zeros(1, 3, 8, 8), None, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="every step needs the shared feature"):
        EDLSTMCell(3, 5, (4, 6), shared_channels=2)(torch.zeros(1, 3, 8, 8))
