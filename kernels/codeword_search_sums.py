"""Sums over vectors for codeword_search's training form in Triton: statistics, errors, gradients.

No atomics: vectors are sorted by the row they belong to (a stable sort), and a row's vectors are added up in that
order, by chunks. A chunk is up to LENGTH vectors of one row; a program takes GROUP of them. Then the chunks of each row
are added in order, in float64. So results are the same bit for bit, whatever runs when, and a row that every vector
chose costs about what many rows cost.

Of a tree only the leaves are collected. With A_i[node] = sum of xi^i over the vectors of a node of layer i,

    sum of xi^(i-1) over the node           S_i[node] = A_i[node] + count_i[node] e_i[node]
    of the parent's own sum                 A_(i-1)[parent] = sum over its children of S_i

so a pass over the codebooks, in float64, takes the place of one over the vectors.

Bytes: z once more, in the order of the rows, and indices; limited by these reads.
"""

import triton
import triton.language as tl

from vpfast.kernels.codeword_search_scan import UNSPECIALIZED, places


@triton.jit
def _checked(code: tl.tensor, M: tl.constexpr) -> tl.tensor:
    """A code outside its codebook is taken for 0: nothing is read out of bounds."""
    return tl.where((code >= 0) & (code < M), code, 0)


@triton.jit
def _from_double(x: tl.tensor, to: tl.constexpr) -> tl.tensor:
    """By way of float32 to less: to bfloat16 there is no other."""
    if to == tl.float64:
        return x
    return x.to(tl.float32).to(to)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def find_rows(
    indices: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    layers: tl.tensor,
    layer: tl.tensor,
    M: tl.constexpr,
    STRICT: tl.constexpr,
    VECTORS: tl.constexpr,
) -> None:
    """The row that each vector chose in layer `layer`, counted from the layer's first."""
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    row = tl.zeros([VECTORS], tl.int64)
    for above in range(0 if STRICT else layer, layer + 1):
        row = row * M + _checked(tl.load(indices + vector * layers + above, mask=vector < N, other=0), M)
    tl.store(rows + vector, row.to(tl.int32), mask=vector < N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def collect(
    source: tl.tensor,
    source_row: tl.tensor,
    source_column: tl.tensor,
    indices: tl.tensor,
    table: tl.tensor,
    weights: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    first_chunks: tl.tensor,
    chunk_rows: tl.tensor,
    sums: tl.tensor,
    counts: tl.tensor,
    errors: tl.tensor,
    chunks: tl.tensor,
    rows: tl.tensor,
    layers: tl.tensor,
    layer: tl.tensor,
    M: tl.constexpr,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    KIND: tl.constexpr,
    STRICT: tl.constexpr,
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """The sum over each chunk's vectors, in the order of `order`, of what KIND says. BD holds all of D.

    given     the vectors of `source` themselves
    measured  of a tree xi^n, else xi^(i-1) of the layer that the chunks belong to; with how many vectors there are, and
              the errors |xi^i|^2 of the layers (chunks, layers), of a flat layer its own (chunks, 1). A vector that is
              not finite is in no sum, and its errors are NaN
    pulled    sum_(i >= layer) weights[i] xi^i, of the finite vectors
    """
    chunk = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    of_row = tl.load(chunk_rows + chunk, mask=chunk < chunks, other=rows)
    used = of_row < rows  # there are at most as many as memory was taken for
    skipped = chunk - tl.load(first_chunks + of_row, mask=used, other=0)
    place = tl.load(starts + of_row, mask=used, other=0) + skipped * LENGTH
    end = tl.load(starts + of_row + 1, mask=used, other=0)
    place = place[:, None] + tl.arange(0, LENGTH)[None, :]
    valid = used[:, None] & (place < end[:, None])
    vector = tl.load(order + place, mask=valid, other=0)
    d = tl.arange(0, BD)[None, None, :]
    here = valid[:, :, None] & (d < D)
    at = places(source, vector[:, :, None], d, source_row, source_column, D, DENSE)
    x = tl.load(at, mask=here, other=0)
    x = x.to(sums.dtype.element_ty)
    if KIND != "given":
        finite = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 2) == 0
        counted = valid & finite
        x = tl.where(counted[:, :, None], x, 0)
        book = tl.zeros([GROUP, LENGTH], tl.int64)
        pulled = tl.zeros([GROUP, LENGTH, BD], x.dtype)
        before = x
        for down in range(0, layers if STRICT or KIND == "pulled" else layer + 1):
            code = _checked(tl.load(indices + vector * layers + down, mask=counted, other=0), M)
            chosen = book * M + code
            e = tl.load(table + chosen[:, :, None] * D + d, mask=counted[:, :, None] & (d < D), other=0)
            before = x
            x -= e
            if KIND == "pulled":
                if down >= layer:
                    pulled += tl.load(weights + down) * x
            elif STRICT:
                squares = tl.sum(tl.where(finite[:, :, None], x * x, float("nan")), 2)
                error = tl.sum(tl.where(valid, squares, 0), 1)
                tl.store(errors + chunk * layers + down, error, mask=chunk < chunks)
            if STRICT:
                book = chosen + 1
            else:
                book += 1
        if KIND == "pulled":
            x = pulled
        else:
            tl.store(counts + chunk, tl.sum(counted.to(tl.int32), 1), mask=chunk < chunks)
            if not STRICT:
                squares = tl.sum(tl.where(finite[:, :, None], x * x, float("nan")), 2)
                tl.store(errors + chunk, tl.sum(tl.where(valid, squares, 0), 1), mask=chunk < chunks)
                x = before
    at = sums + chunk[:, None] * D + tl.arange(0, BD)[None, :]
    tl.store(at, tl.sum(x, 1), mask=used[:, None] & (tl.arange(0, BD) < D)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def add_chunks(
    sums: tl.tensor,
    counts: tl.tensor,
    first_chunks: tl.tensor,
    row_sums: tl.tensor,
    row_counts: tl.tensor,
    rows: tl.tensor,
    D: tl.constexpr,
    COUNTED: tl.constexpr,
    GROUP: tl.constexpr,
    LENGTH: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """The sum of each row's chunks in float64, LENGTH at a time; of the columns that program_id(1) says."""
    row = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    first = tl.load(first_chunks + row, mask=row < rows, other=0)
    end = tl.load(first_chunks + row + 1, mask=row < rows, other=0)
    total = tl.zeros([GROUP, BD], tl.float64)
    count = tl.zeros([GROUP], tl.int64)
    for begin in range(0, tl.max(end - first, 0), LENGTH):
        chunk = first[:, None] + begin + tl.arange(0, LENGTH)[None, :]
        there = chunk < end[:, None]
        here = there[:, :, None] & (d < D)[None, None, :]
        some = tl.load(sums + chunk[:, :, None] * D + d[None, None, :], mask=here, other=0)
        total += tl.sum(some.to(tl.float64), 1)
        if COUNTED:
            count += tl.sum(tl.load(counts + chunk, mask=there, other=0).to(tl.int64), 1)
    tl.store(row_sums + row[:, None] * D + d[None, :], total, mask=(row < rows)[:, None] & (d < D)[None, :])
    if COUNTED and tl.program_id(1) == 0:
        tl.store(row_counts + row, count.to(tl.float64), mask=row < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def climb(
    below: tl.tensor,
    counts_below: tl.tensor,
    table: tl.tensor,
    here: tl.tensor,
    counts_here: tl.tensor,
    sums: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    D: tl.constexpr,
    CHILDREN: tl.constexpr,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """One layer of a tree from the one below: each row's sum over its children, COUNTED: and its count, and count times
    codeword added to the sum. Both in float64 for the layer above, and in the types of the results."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    there = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    total = tl.zeros([ROWS, BD], tl.float64)
    count = tl.zeros([ROWS], tl.float64)
    for child in range(0, CHILDREN):
        of_child = row * CHILDREN + child
        total += tl.load(below + of_child[:, None] * D + d[None, :], mask=there, other=0)
        if COUNTED:
            count += tl.load(counts_below + of_child, mask=row < rows, other=0)
    if COUNTED:
        e = tl.load(table + at, mask=there & (count > 0)[:, None], other=0).to(tl.float64)
        total += count[:, None] * e
        if tl.program_id(1) == 0:
            tl.store(counts_here + row, count, mask=row < rows)
            tl.store(counts + row, count.to(counts.dtype.element_ty), mask=row < rows)
    tl.store(here + at, total, mask=there)
    tl.store(sums + at, _from_double(total, sums.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pull_rows(
    below: tl.tensor,
    table: tl.tensor,
    counts: tl.tensor,
    sums: tl.tensor,
    weights: tl.tensor,
    here: tl.tensor,
    gradient: tl.tensor,
    rows: tl.tensor,
    layers: tl.tensor,
    layer: tl.tensor,
    D: tl.constexpr,
    CHILDREN: tl.constexpr,
    ROWS: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """The gradient of a tree's layer j: of a row, sum_(i >= j) weights[i] (sum of xi^i over its vectors).

    `here` (layers - j, rows, D) are these sums in float64, `below` those of the layer below; xi^j is what the
    statistics tell.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    there = (row < rows)[:, None] & (d < D)[None, :]
    at = row[:, None] * D + d[None, :]
    count = tl.load(counts + row, mask=row < rows, other=0).to(tl.float64)[:, None]
    chosen = there & (count > 0)
    own = tl.load(sums + at, mask=chosen, other=0).to(tl.float64)
    own -= count * tl.load(table + at, mask=chosen, other=0).to(tl.float64)
    tl.store(here + at, own, mask=there)
    weight = tl.load(weights + layer).to(tl.float64)
    total = tl.where(weight != 0, weight * own, 0)
    size = tl.zeros([], tl.int64) + rows
    for deeper in range(layer + 1, layers):
        own = tl.zeros([ROWS, BD], tl.float64)
        origin = below + (deeper - layer - 1) * size * CHILDREN * D
        for child in range(0, CHILDREN):
            own += tl.load(origin + (row * CHILDREN + child)[:, None] * D + d[None, :], mask=there, other=0)
        tl.store(here + (deeper - layer) * size * D + at, own, mask=there)
        weight = tl.load(weights + deeper).to(tl.float64)
        total += tl.where(weight != 0, weight * own, 0)
    tl.store(gradient + at, _from_double(total, gradient.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def pull_vectors(
    z: tl.tensor,
    z_row: tl.tensor,
    z_column: tl.tensor,
    grad: tl.tensor,
    grad_row: tl.tensor,
    grad_column: tl.tensor,
    indices: tl.tensor,
    table: tl.tensor,
    weights: tl.tensor,
    grad_z: tl.tensor,
    N: tl.tensor,
    layers: tl.tensor,
    M: tl.constexpr,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    GIVEN: tl.constexpr,
    GRAD_DENSE: tl.constexpr,
    STRICT: tl.constexpr,
    VECTORS: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """grad_z = grad (where GIVEN) + sum_i weights[i] xi^i. BD holds all of D."""
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    d = tl.arange(0, BD)
    inside = vector < N
    here = inside[:, None] & (d < D)[None, :]
    at = places(z, vector[:, None], d[None, :], z_row, z_column, D, DENSE)
    x = tl.load(at, mask=here, other=0).to(table.dtype.element_ty)
    finite = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 1) == 0
    x = tl.where(finite[:, None], x, float("nan"))
    total = tl.zeros([VECTORS, BD], x.dtype)
    if GIVEN:
        at = places(grad, vector[:, None], d[None, :], grad_row, grad_column, D, GRAD_DENSE)
        total += tl.load(at, mask=here, other=0)
    book = tl.zeros([VECTORS], tl.int64)
    for layer in range(0, layers):
        chosen = book * M + _checked(tl.load(indices + vector * layers + layer, mask=inside, other=0), M)
        x -= tl.load(table + chosen[:, None] * D + d[None, :], mask=here, other=0)
        total += tl.load(weights + layer) * x
        if STRICT:
            book = chosen + 1
        else:
            book += 1
    tl.store(grad_z + vector[:, None] * D + d[None, :], total.to(grad_z.dtype.element_ty), mask=here)
