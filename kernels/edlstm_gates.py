"""edlstm_gates on a GPU, in Triton: what runs where there is no compiled extension.

Story. Contiguous (B, 4C, *) gates are B rows of C*S elements a gate, channels_last ones B*S rows of C elements (S the
product of the trailing dims); rows may lie any distance apart, so a slice over the batch and a batch-expanded state are
read where they are. A row is cut into items of WIDTH consecutive elements, 16 bytes of the cell where rows and pointers
allow it (8 in backward with 16-bit gates, else too many registers), else one. A program has ITEMS of them, a thread
one: it divides once for its item's row, loads, computes, stores. Nothing is exchanged between elements.

Bytes an element of s: forward 7 s, backward 12 s, each once; that should be the time. What could be longer are the
exponentials: where all results are stored in 16 bits, they are the GPU's instruction for 2^y and little else; otherwise
they are exact near 0 and far out in the tails too. `EXACT` tells the bits that matter. Compiled for sm_90 an element
takes, of the instructions that an H200 starts at its copy rate, 101 of 198 forward in float32 and 61 of 99 in bfloat16,
141 of 339 and 111 of 170 backward. Not measured on a GPU.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vpfast.kernels._ahead_of_time import Compilation

LOG2_E = tl.constexpr(1.4426950408889634)

# The interpreter, which needs no GPU, knows no machine instructions.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Arguments that Triton need not compile a kernel of its own for when they are 1 or divisible by 16: WIDTH says enough.
NUMBERS = ("items", "items_in_row", "gates_stride", "c_prev_stride", "grad_h_stride", "grad_c_stride")

# --- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def _reciprocal(x: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """1 / x for x from 1 to 2^126: an instruction, where a division takes seven. Good to 1 unit in the last place."""
    if EXACT == 64 or INTERPRETED:
        r = 1.0 / x
    else:
        r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return r


@triton.jit
def _held(x: tl.tensor, least: float, most: float) -> tl.tensor:
    """The nearer of x and the ends; a NaN stays."""
    above = tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fit(s: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    """(e^-s - 1 + s) / s^2 for |s| <= ln 2 / 2: a minimax fit for float32, the Taylor series for float64."""
    if EXACT == 32:
        p = 0.0013814541 * s - 0.0083687454
        p = p * s + 0.041668389
        p = p * s - 0.16666521
        p = p * s + 0.49999994
    else:
        p = s * (-1 / 1307674368000.0) + 1 / 87178291200.0
        p = p * s - 1 / 6227020800.0
        p = p * s + 1 / 479001600.0
        p = p * s - 1 / 39916800.0
        p = p * s + 1 / 3628800.0
        p = p * s - 1 / 362880.0
        p = p * s + 1 / 40320.0
        p = p * s - 1 / 5040.0
        p = p * s + 1 / 720.0
        p = p * s - 1 / 120.0
        p = p * s + 1 / 24.0
        p = p * s - 1 / 6.0
        p = p * s + 0.5
    return p


@triton.jit
def _reduced(v: tl.tensor, EXACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(s, 2^n) with v = s - n ln 2, |s| <= ln 2 / 2; v is held where e^-v is a normal number."""
    if EXACT == 32:
        v = _held(v, -86.0, 86.0)
        shifted = v * -LOG2_E + 12583039.0  # 1.5 * 2^23, to round, and 127, which makes the lowest bits an exponent
        n = shifted - 12583039.0
        s = (v + n * 0.693359375) - n * 2.12194440e-4  # the first product is exact
        scale = (shifted.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    else:
        v = _held(v, -700.0, 700.0)
        shifted = v * -LOG2_E + 6755399441056767.0  # 1.5 * 2^52 and 1023
        n = shifted - 6755399441056767.0
        s = (v + n * 0.693147180369123816490) + n * 1.90821492927058770002e-10
        scale = (shifted.to(tl.int64, bitcast=True) << 52).to(tl.float64, bitcast=True)
    return s, scale


@triton.jit
def _sigmoid(x: tl.tensor, EXACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(bottom, e): sigmoid = 1 / bottom, its derivative e / bottom^2."""
    if EXACT == 16:
        e = tl.exp2(tl.minimum(x * -LOG2_E, 125.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        s, scale = _reduced(x, EXACT)
        if EXACT == 32:
            e = tl.exp2(s * -LOG2_E) * scale
        else:
            e = (_fit(s, EXACT) * (s * s) - s + 1.0) * scale
    return 1.0 + e, e


@triton.jit
def _tanh(x: tl.tensor, EXACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(top, bottom, e): tanh = top / bottom, its derivative 4 e / bottom^2. 1 - e^-2|x| would cancel near 0."""
    size = tl.abs(x)
    if EXACT == 16:
        e = tl.exp2(size * (-2.0 * LOG2_E))
        fit = ((1.27237165 * size - 1.99857533) * size + 1.99999499) * size  # below 1/16, to 3e-6
        rest = tl.where(size < 0.0625, fit, 1.0 - e)
        bottom = 1.0 + e
    else:
        s, scale = _reduced(2.0 * size, EXACT)
        q = (_fit(s, EXACT) * (s * s) - s) * scale
        e = scale + q
        rest = (1.0 - scale) - q
        bottom = 2.0 - rest
    return tl.where(x < 0.0, -rest, rest), bottom, e


@triton.jit
def _cell(f: tl.tensor, i: tl.tensor, g: tl.tensor, c_prev: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    f_bottom, _ = _sigmoid(f, EXACT)
    i_bottom, _ = _sigmoid(i, EXACT)
    g_top, g_bottom, _ = _tanh(g, EXACT)
    return c_prev * _reciprocal(f_bottom, EXACT) + g_top * _reciprocal(i_bottom * g_bottom, EXACT)


@triton.jit
def _hidden(o: tl.tensor, c: tl.tensor, EXACT: tl.constexpr) -> tl.tensor:
    o_bottom, _ = _sigmoid(o, EXACT)
    c_top, c_bottom, _ = _tanh(c, EXACT)
    return c_top * _reciprocal(o_bottom * c_bottom, EXACT)


@triton.jit
def _sigmoid_and_slope(x: tl.tensor, EXACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    bottom, e = _sigmoid(x, EXACT)
    r = _reciprocal(bottom, EXACT)
    return r, e * r * r


@triton.jit
def _tanh_and_slope(x: tl.tensor, EXACT: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    top, bottom, e = _tanh(x, EXACT)
    r = _reciprocal(bottom, EXACT)
    return top * r, 4.0 * e * r * r


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _places(
    items: tl.tensor, items_in_row: tl.tensor, ITEMS: tl.constexpr, WIDE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Of this program's items: their numbers, rows and columns, the latter counted in items; and which there are."""
    program = tl.program_id(0)
    item = (program.to(tl.int64) if WIDE else program) * ITEMS + tl.arange(0, ITEMS)
    row = item // items_in_row
    return item.to(tl.int64), row.to(tl.int64), (item - row * items_in_row).to(tl.int64), item < items


@triton.jit
def _elements(item: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """(ITEMS, WIDTH) offsets of the elements of items that begin at `item` * WIDTH."""
    return item[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit(do_not_specialize=NUMBERS)
def _forward(
    gates: tl.tensor,
    c_prev: tl.tensor,
    h: tl.tensor,
    c: tl.tensor,
    items: tl.tensor,
    items_in_row: tl.tensor,
    gates_stride: tl.tensor,  # from row to row, in items
    c_prev_stride: tl.tensor,
    F: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    ITEMS: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    work = tl.float64 if EXACT == 64 else tl.float32
    item, row, column, live = _places(items, items_in_row, ITEMS, WIDE)
    here = live[:, None]
    block = items_in_row.to(tl.int64)
    in_gates = row * gates_stride + column
    x_f = tl.load(gates + _elements(in_gates + F * block, WIDTH), here, eviction_policy="evict_first")
    x_i = tl.load(gates + _elements(in_gates + I * block, WIDTH), here, eviction_policy="evict_first")
    x_g = tl.load(gates + _elements(in_gates + G * block, WIDTH), here, eviction_policy="evict_first")
    x_o = tl.load(gates + _elements(in_gates + O * block, WIDTH), here, eviction_policy="evict_first")
    x_c = tl.load(c_prev + _elements(row * c_prev_stride + column, WIDTH), here)

    state = _cell(x_f.to(work), x_i.to(work), x_g.to(work), x_c.to(work), EXACT)
    out = _elements(item, WIDTH)
    tl.store(c + out, state, here)
    tl.store(h + out, _hidden(x_o.to(work), state, EXACT), here)


@triton.jit(do_not_specialize=NUMBERS)
def _backward(
    grad_h: tl.tensor,
    grad_c: tl.tensor,
    gates: tl.tensor,
    c_prev: tl.tensor,
    grad_gates: tl.tensor,
    grad_c_prev: tl.tensor,
    items: tl.tensor,
    items_in_row: tl.tensor,
    gates_stride: tl.tensor,  # from row to row, in items
    c_prev_stride: tl.tensor,
    grad_h_stride: tl.tensor,
    grad_c_stride: tl.tensor,
    HAS_H: tl.constexpr,
    HAS_C: tl.constexpr,
    F: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    O: tl.constexpr,  # noqa: E741
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    ITEMS: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    work = tl.float64 if EXACT == 64 else tl.float32
    item, row, column, live = _places(items, items_in_row, ITEMS, WIDE)
    here = live[:, None]
    block = items_in_row.to(tl.int64)
    in_gates = row * gates_stride + column
    x_f = tl.load(gates + _elements(in_gates + F * block, WIDTH), here, eviction_policy="evict_first")
    x_i = tl.load(gates + _elements(in_gates + I * block, WIDTH), here, eviction_policy="evict_first")
    x_g = tl.load(gates + _elements(in_gates + G * block, WIDTH), here, eviction_policy="evict_first")
    x_o = tl.load(gates + _elements(in_gates + O * block, WIDTH), here, eviction_policy="evict_first")
    x_c = tl.load(c_prev + _elements(row * c_prev_stride + column, WIDTH), here)
    if HAS_H:
        at_h = grad_h + _elements(row * grad_h_stride + column, WIDTH)
        d_h = tl.load(at_h, here, eviction_policy="evict_first").to(work)
    else:
        d_h = tl.zeros((ITEMS, WIDTH), work)
    if HAS_C:
        at_c = grad_c + _elements(row * grad_c_stride + column, WIDTH)
        d_c = tl.load(at_c, here, eviction_policy="evict_first").to(work)
    else:
        d_c = tl.zeros((ITEMS, WIDTH), work)

    old = x_c.to(work)
    f, f_slope = _sigmoid_and_slope(x_f.to(work), EXACT)
    i, i_slope = _sigmoid_and_slope(x_i.to(work), EXACT)
    g, g_slope = _tanh_and_slope(x_g.to(work), EXACT)
    o, o_slope = _sigmoid_and_slope(x_o.to(work), EXACT)
    tanh_c, c_slope = _tanh_and_slope(f * old + i * g, EXACT)
    d_cell = d_h * o * c_slope + d_c

    in_grads = 4 * row * block + column
    tl.store(grad_gates + _elements(in_grads + F * block, WIDTH), d_cell * old * f_slope, here)
    tl.store(grad_gates + _elements(in_grads + I * block, WIDTH), d_cell * g * i_slope, here)
    tl.store(grad_gates + _elements(in_grads + G * block, WIDTH), d_cell * i * g_slope, here)
    tl.store(grad_gates + _elements(in_grads + O * block, WIDTH), d_h * tanh_c * o_slope, here)
    tl.store(grad_c_prev + _elements(item, WIDTH), d_cell * f, here)


# --- launches --------------------------------------------------------------------------------------------------------


def _layout(gates: Tensor) -> torch.memory_format:
    """That of every output: channels_last (2-D or 3-D) where ``gates`` is, else contiguous."""
    if not gates.is_contiguous():
        for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            if gates.dim() == dims and gates.is_contiguous(memory_format=layout):
                return layout
    return torch.contiguous_format


def _in_rows(t: Tensor, layout: torch.memory_format) -> Tensor:
    """``t`` itself where its rows are packed, any distance apart; else a copy in ``layout``."""
    packed = t[0].is_contiguous() if layout == torch.contiguous_format else t.is_contiguous(memory_format=layout)
    return t if packed else t.contiguous(memory_format=layout)


def _row_stride(t: Tensor, layout: torch.memory_format) -> int:
    if layout == torch.contiguous_format:
        return t.stride(0) if t.shape[0] > 1 else 0
    return t.shape[1]


def _exactness(gates: torch.dtype, cell: torch.dtype) -> int:
    """The bits that results are rounded to at best."""
    return 8 * max(gates.itemsize, cell.itemsize)


def _fitting(width: int, row_length: int, tensors: list[Tensor], strides: list[int]) -> int:
    """``width``, or 1 where rows or pointers do not allow accesses of as many elements."""
    for t, stride in zip(tensors, strides, strict=True):
        access = min(16, width * t.element_size())
        if t.data_ptr() % access or stride * t.element_size() % access:
            return 1
    return width if row_length % width == 0 else 1


def _forward_width(cell: torch.dtype) -> int:
    return 16 // cell.itemsize if cell != torch.float64 else 1


def _backward_width(cell: torch.dtype) -> int:
    return min(4, _forward_width(cell))


def _items_a_program(width: int, exact: int) -> int:
    """A thread has one item; of single elements two, to keep more bytes on their way. Doubles are for checks: one,
    since dividing them is a subroutine, before which the compiler puts registers aside in memory."""
    return THREADS * (2 if width == 1 and exact < 64 else 1)


THREADS = 256
# Said, since Triton is about to change what it does unsaid: fused products are a third of the instructions.
OPTIONS: dict[str, int | bool] = {"num_warps": THREADS // 32, "enable_fp_fusion": True}
NARROW = 2**31  # below it numbers of items, and of those that the last program lacks, are 32-bit


def _constants(order: str, width: int, exact: int, items: int) -> dict[str, object]:
    places = {gate.upper(): order.index(gate) for gate in "fiog"}
    chunk = _items_a_program(width, exact)
    return {**places, "WIDTH": width, "ITEMS": chunk, "EXACT": exact, "WIDE": items + chunk > NARROW}


def edlstm_gates(gates: Tensor, c_prev: Tensor, order: str) -> tuple[Tensor, Tensor]:
    """``vpfast::edlstm_gates_triton``: gates (B, 4C, *) and c_prev (B, C, *) -> (h, c), as the public function says."""
    layout = _layout(gates)
    h = torch.empty_like(c_prev, dtype=gates.dtype, memory_format=layout)
    c = torch.empty_like(c_prev, memory_format=layout)
    if c_prev.numel() == 0:
        return h, c
    gates, c_prev = _in_rows(gates, layout), _in_rows(c_prev, layout)
    row_length = c_prev[0].numel() if layout == torch.contiguous_format else c_prev.shape[1]
    strides = [_row_stride(t, layout) for t in (gates, c_prev)]
    width = _fitting(_forward_width(c_prev.dtype), row_length, [gates, c_prev], strides)
    items = c_prev.numel() // width
    exact = _exactness(gates.dtype, c_prev.dtype)
    constants = _constants(order, width, exact, items)
    grid = (triton.cdiv(items, _items_a_program(width, exact)),)
    in_items = [stride // width for stride in strides]
    _forward[grid](gates, c_prev, h, c, items, row_length // width, *in_items, **constants, **OPTIONS)
    return h, c


def edlstm_gates_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, gates: Tensor, c_prev: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    """``vpfast::edlstm_gates_backward_triton``: -> (grad_gates, grad_c_prev); None is a gradient of zeros."""
    layout = _layout(gates)
    grad_gates = torch.empty_like(gates, memory_format=layout)
    grad_c_prev = torch.empty_like(c_prev, memory_format=layout)
    if c_prev.numel() == 0:
        return grad_gates, grad_c_prev
    gates, c_prev = _in_rows(gates, layout), _in_rows(c_prev, layout)
    has_h, has_c = grad_h is not None, grad_c is not None
    # What stands in for a missing gradient is not read.
    grad_h = _in_rows(grad_h, layout) if grad_h is not None else gates
    grad_c = _in_rows(grad_c, layout) if grad_c is not None else c_prev
    row_length = c_prev[0].numel() if layout == torch.contiguous_format else c_prev.shape[1]
    tensors = [gates, c_prev, grad_h, grad_c]
    strides = [_row_stride(t, layout) for t in tensors]
    width = _fitting(_backward_width(c_prev.dtype), row_length, tensors, strides)
    items = c_prev.numel() // width
    exact = _exactness(gates.dtype, c_prev.dtype)
    constants = _constants(order, width, exact, items)
    grid = (triton.cdiv(items, _items_a_program(width, exact)),)
    in_items = [stride // width for stride in strides]
    _backward[grid](
        grad_h,
        grad_c,
        gates,
        c_prev,
        grad_gates,
        grad_c_prev,
        items,
        row_length // width,
        *in_items,
        HAS_H=has_h,
        HAS_C=has_c,
        **constants,
        **OPTIONS,
    )
    return grad_gates, grad_c_prev


# --- compilation with no GPU -----------------------------------------------------------------------------------------

_TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_PAIRS = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)


def ahead_of_time() -> Iterator[Compilation]:
    """Forward and backward for every pair of types with wide accesses, for two of them also with single ones."""
    for gates, cell in _PAIRS:
        for backward in (False, True):
            widest = (_backward_width if backward else _forward_width)(cell)
            for width in (widest, 1) if gates == cell and gates in (torch.float32, torch.bfloat16) else (widest,):
                yield _compilation(gates, cell, backward, width)


def _compilation(gates: torch.dtype, cell: torch.dtype, backward: bool, width: int) -> Compilation:
    kernel = _backward if backward else _forward
    g, c = _TYPES[gates], _TYPES[cell]
    types = [g, c, g, c, g, c] if backward else [g, c, g, c]
    types += ["i32", "i32"] + ["i32"] * (4 if backward else 2)
    constants = _constants("fiog", width, _exactness(gates, cell), items=1)
    if backward:
        constants = {"HAS_H": True, "HAS_C": True, **constants}
    names = kernel.arg_names
    signature = dict(zip(names, types + ["constexpr"] * len(constants), strict=True))
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    kinds = f"{gates}-{cell}".replace("torch.", "")
    name = f"edlstm_gates{'_backward' if backward else ''} {kinds} by {width}"
    return Compilation(name, kernel, signature, constants, THREADS // 32, 3, pointers if width > 1 else ())
