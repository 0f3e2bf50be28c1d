"""Rows of queries, keys, values and gradients: how tiles of them are read and multiplied.

A tensor is (B, heads, L, d) with its last dimension dense. Strides are given in units of UNIT elements, 16 bytes where
all of them allow it, so that the compiler knows that rows can be read 16 bytes at a time whatever their length.
Offsets of batches, heads and rows are 64-bit. A row of up to 128 components is one tile, padded to a power of 2 by a
mask; longer ones are taken D at a time, CHUNKS of them.
"""

import triton
import triton.language as tl


@triton.jit
def plane_at(pointer, plane, heads, of_batch, of_head, UNIT: tl.constexpr):
    """Where one head of one batch begins."""
    batch, head = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    return pointer + (batch * of_batch + head * of_head) * UNIT


@triton.jit
def rows_at(pointer, of_row, start, SIZE: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr):
    """Pointers (SIZE, D) to the rows from ``start`` on."""
    step = of_row.to(tl.int64) * UNIT
    return pointer + start * step + (tl.arange(0, SIZE)[:, None] * step + tl.arange(0, D)[None, :])


@triton.jit
def load_rows(
    pointer,
    of_row,
    start,
    end,
    chunk,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """A tile (SIZE, D), 0 where a row has no more components and, if MASKED, in rows from ``end`` on."""
    tile = rows_at(pointer + chunk * D, of_row, start, SIZE, D, UNIT)
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
def add_weighted(total, weights, seen, rows, CAREFUL: tl.constexpr, PRECISION: tl.constexpr):
    """``total`` + ``weights`` times ``rows``. Where something is hidden and may be no finite number, it is CAREFUL: 0
    times that has no part in the sum; where it is seen the sum is NaN."""
    if CAREFUL:
        finite = tl.abs(rows.to(total.dtype)) < float("inf")
        strange = (finite == 0).to(tl.float32).to(rows.dtype)
        spoilt = tl.dot(seen.to(tl.float32).to(rows.dtype), strange, input_precision=PRECISION, out_dtype=total.dtype) > 0
        rows = tl.where(finite, rows, 0.0)
        total = tl.dot(weights.to(rows.dtype), rows, total, input_precision=PRECISION, out_dtype=total.dtype)
        return tl.where(spoilt, float("nan"), total)
    return tl.dot(weights.to(rows.dtype), rows, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def products(
    fixed,
    moving,
    fixed_at,
    of_fixed,
    fixed_start,
    fixed_end,
    moving_at,
    of_moving,
    moving_start,
    moving_end,
    FIXED: tl.constexpr,
    MOVING: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM: tl.constexpr,
):
    """Every fixed row times every moving one, (FIXED, MOVING), of tiles at hand or, where rows are long, in CHUNKS."""
    if CHUNKS == 1:
        return tl.dot(fixed, tl.trans(moving), input_precision=PRECISION, out_dtype=SUM)
    total = tl.zeros((FIXED, MOVING), SUM)
    for chunk in range(CHUNKS):
        a = load_rows(fixed_at, of_fixed, fixed_start, fixed_end, chunk, True, FIXED, DIM, D, UNIT)
        b = load_rows(moving_at, of_moving, moving_start, moving_end, chunk, True, MOVING, DIM, D, UNIT)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION, out_dtype=SUM)
    return total


@triton.jit
def peak_of(
    pointer,
    of_row,
    start,
    end,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Of rows start .. end: the largest sum of squares of a finite one, and 1 if there is another, else 0."""
    peak, strange = 0.0, 0
    for first in range(start, end, SIZE):
        squares = tl.zeros((SIZE,), tl.float32)
        for chunk in range(CHUNKS):
            rows = load_rows(pointer, of_row, first, end, chunk, True, SIZE, DIM, D, UNIT).to(tl.float32)
            squares += tl.sum(rows * rows, 1)
        finite = squares < float("inf")
        peak = tl.maximum(peak, tl.max(tl.where(finite, squares, 0.0), 0))
        strange = tl.maximum(strange, tl.max((finite == 0).to(tl.int32), 0))
    return peak, strange
