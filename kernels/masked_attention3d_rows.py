"""Rows of queries, keys, values and gradients: how tiles of them are read and multiplied.

A tensor is (B, heads, L, d) with its last dimension dense. Strides are given in units of UNIT elements, 16 bytes where
all of them allow it, so that the compiler knows that rows can be read 16 bytes at a time whatever their length.
Offsets of batches, heads and rows are 64-bit. A row of up to 128 components is one tile, padded to a power of 2 by a
mask; longer ones are taken D at a time, CHUNKS of them.
"""

import triton
import triton.language as tl

PRECISION = tl.constexpr("ieee")  # of float32: three products of tf32 sum with less than float32's accuracy


@triton.jit
def plane_at(
    pointer: tl.tensor, plane: tl.tensor, heads: tl.tensor, of_batch: tl.tensor, of_head: tl.tensor, UNIT: tl.constexpr
) -> tl.tensor:
    """Where one head of one batch begins."""
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    return pointer + (batch * of_batch + head * of_head) * UNIT


@triton.jit
def rows_at(
    pointer: tl.tensor, of_row: tl.tensor, start: tl.tensor, SIZE: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr
) -> tl.tensor:
    """Pointers (SIZE, D) to the rows from ``start`` on."""
    step = of_row.to(tl.int64) * UNIT
    return pointer + start * step + (tl.arange(0, SIZE)[:, None] * step + tl.arange(0, D)[None, :])


@triton.jit
def load_rows(
    rows: tl.tuple,
    start: tl.tensor,
    end: tl.tensor,
    chunk: tl.tensor,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """A tile (SIZE, D) of ``rows``, a plane's pointer and the stride of its rows: 0 where a row has no more components
    and, if MASKED, in rows from ``end`` on."""
    tile = rows_at(rows[0] + chunk * D, rows[1], start, SIZE, D, UNIT)
    inside = (start + tl.arange(0, SIZE) < end)[:, None]
    known = (chunk * D + tl.arange(0, D) < DIM)[None, :]
    if MASKED and DIM % D != 0:
        return tl.load(tile, mask=inside & known, other=0.0)
    if MASKED:
        return tl.load(tile, mask=inside, other=0.0)
    if DIM % D != 0:
        return tl.load(tile, mask=known, other=0.0)
    return tl.load(tile)


@triton.jit
def add_weighted(
    total: tl.tensor, weights: tl.tensor, seen: tl.tensor, rows: tl.tensor, CAREFUL: tl.constexpr
) -> tl.tensor:
    """``total`` + ``weights`` times ``rows``. Where something is hidden and may be no finite number, it is CAREFUL: 0
    times that has no part in the sum; where it is seen the sum is NaN."""
    if CAREFUL:
        finite = tl.abs(rows.to(total.dtype)) < float("inf")
        strange = (finite == 0).to(tl.float32).to(rows.dtype)
        spoilt = (
            tl.dot(seen.to(tl.float32).to(rows.dtype), strange, input_precision=PRECISION, out_dtype=total.dtype) > 0
        )
        rows = tl.where(finite, rows, 0.0)
        total = tl.dot(weights.to(rows.dtype), rows, total, input_precision=PRECISION, out_dtype=total.dtype)
        return tl.where(spoilt, float("nan"), total)
    return tl.dot(weights.to(rows.dtype), rows, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def products(
    fixed: tl.tensor,
    moving: tl.tensor,
    fixed_rows: tl.tuple,
    own: tl.tuple,
    moving_rows: tl.tuple,
    start: tl.tensor,
    length: tl.tensor,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """Every fixed row times every moving one, (FIXED, MOVING): of the tiles at hand or, where rows are long, of all
    CHUNKS of rows ``own`` (first, end), and of those from ``start`` on."""
    SUM: tl.constexpr = tl.float64 if fixed.dtype == tl.float64 else tl.float32
    if CHUNKS == 1:
        return tl.dot(fixed, tl.trans(moving), input_precision=PRECISION, out_dtype=SUM)
    total = tl.zeros((FIXED, MOVING), SUM)
    for chunk in range(CHUNKS):
        a = load_rows(fixed_rows, own[0], own[1], chunk, True, FIXED, DIM, D, UNIT)
        b = load_rows(moving_rows, start, length, chunk, True, MOVING, DIM, D, UNIT)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION, out_dtype=SUM)
    return total


@triton.jit
def peak_of(
    rows: tl.tuple,
    start: tl.tensor,
    end: tl.tensor,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Of rows start .. end: the largest sum of squares of a finite one, and 1 if there is another, else 0."""
    peak, strange = 0.0, 0
    for first in range(start, end, SIZE):
        squares = tl.zeros((SIZE,), tl.float32)
        for chunk in range(CHUNKS):
            tile = load_rows(rows, first, end, chunk, True, SIZE, DIM, D, UNIT).to(tl.float32)
            squares += tl.sum(tile * tile, 1)
        finite = squares < float("inf")
        peak = tl.maximum(peak, tl.max(tl.where(finite, squares, 0.0), 0))
        strange = tl.maximum(strange, tl.max((finite == 0).to(tl.int32), 0))
    return peak, strange
