"""The search of codeword_search in Triton: scans in float32, and a search in float64 where they are unsure.

A scan goes by the score s_j = xi . e_j - |e_j|^2 / 2, largest where the distance is smallest, at one multiplication a
term. Scores lie within half a margin of the true ones. A vector whose best score is clear of the second by the margin
in every layer has its codes; any other goes, by its number, onto a list, and `decide` searches it again from the start,
by distances in float64. The list's order is chance, a vector's codes do not depend on it. Nothing is read back.

Two scans, both with all layers in one pass over z:

    scan_by_vector   trees, and small codebooks: a program holds some vectors in registers, and each vector looks at its
                     own codebook, of which it reads a run of M D numbers. A 3 x 8 tree of D = 8 stays in the L1 cache.
                     Limited by these reads: n M D numbers a vector, from L1.
    scan_by_tile     large codebooks that all vectors share: tiles of vectors and codewords as in a matrix product, the
                     best two scores of each lane kept in the product's place. float32 throughout, never TF32. Limited
                     by multiplications. Residuals of layers after the first wait in memory of the program's own, which
                     the L2 cache holds.

A vector with NaN or infinity has codes 0, by the scans' own doing; `decide` sees such a vector only of float64.

Codebooks of all layers are rows of one table, and books are numbered through all layers: code k of book b is row
b M + k. In a strict tree the book below row r is r + 1, as in a heap; without the tree book b + 1 follows book b.
"""

import triton
import triton.language as tl

MEASURED_TOGETHER = 128
"""Of how many codewords one entry of `lengths` tells the longest and the shortest."""


UNSPECIALIZED = ("N", "layers", "layer", "tiles", "books", "rows", "chunks")
"""Numbers that no kernel is compiled anew for."""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def measure_codewords(
    table: tl.tensor,
    biases: tl.tensor,
    lengths: tl.tensor,
    unsure: tl.tensor,
    books: tl.tensor,
    tiles: tl.tensor,
    M: tl.constexpr,
    D: tl.constexpr,
    BOOKS: tl.constexpr,
    CODES: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """-|e|^2 / 2 of every codeword, and the longest and shortest of each tile of CODES; empties the list of the unsure.

    A codeword that is not finite has a bias of -infinity and no length.
    """
    program = tl.program_id(0).to(tl.int64)
    if program == 0:
        tl.store(unsure, 0)
    tile = program % tiles
    book = program // tiles * BOOKS + tl.arange(0, BOOKS)
    code = tile * CODES + tl.arange(0, CODES)
    inside = (book < books)[:, None] & (code < M)[None, :]
    row = book[:, None] * M + code[None, :]
    squares = tl.zeros([BOOKS, CODES], tl.float64)
    for first in range(0, D, BD):
        d = first + tl.arange(0, BD)
        here = inside[:, :, None] & (d < D)[None, None, :]
        e = tl.load(table + row[:, :, None] * D + d[None, None, :], mask=here, other=0).to(tl.float64)
        squares += tl.sum(e * e, 2)
    finite = inside & (squares < float("inf"))
    tl.store(biases + row, tl.where(finite, squares * -0.5, float("-inf")).to(tl.float32), mask=inside)
    longest = tl.sqrt(tl.max(tl.where(finite, squares, 0), 1))
    shortest = tl.sqrt(tl.min(tl.where(finite, squares, float("inf")), 1))
    entry = lengths + (book * tiles + tile) * 2
    tl.store(entry, longest.to(tl.float32), mask=book < books)
    tl.store(entry + 1, shortest.to(tl.float32), mask=book < books)


@triton.jit
def places(
    z: tl.tensor,
    vector: tl.tensor,
    d: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    D: tl.constexpr,
    DENSE: tl.constexpr,
) -> tl.tensor:
    """Where components d of vectors lie; DENSE: one vector after another, which lets Triton read them whole."""
    if DENSE:
        return z + vector * D + d
    return z + vector * row + d.to(tl.int64) * column


@triton.jit
def _reach(length: tl.tensor, longest: tl.tensor, shortest: tl.tensor) -> tl.tensor:
    """No codeword longer than this comes near being the nearest to a residual of at most `length`: one beyond 4 |xi| +
    2 |m|, with m the shortest of its codebook, scores below -|e|^2 / 4, and m above -|e|^2 / 8."""
    far = 4 * length + 2 * shortest
    return tl.where((far < longest) | (shortest > longest), far, longest)


@triton.jit
def _margin(D: tl.constexpr, layer: tl.tensor, length: tl.tensor, longest: tl.tensor, reach: tl.tensor) -> tl.tensor:
    """By how much scores must differ for distances in float64 to have the same order; infinite where a scan could
    overflow. The formula of `uncertainty` in csrc/codeword_search/codeword_search_math.h, which says why."""
    largest = length * reach + reach * reach * 0.5
    distance = (length + reach) * (length + reach)
    margin = 2.2 * (layer + D + 3) * (5.97e-8 * largest + 1.12e-16 * distance + 1.2e-38)
    certain = (length * longest + longest * longest * 0.5 < 1e37) & (reach <= longest)
    return tl.where(certain, margin, float("inf"))


@triton.jit
def _two_best(score: tl.tensor, CODES: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of each row of (VECTORS, CODES): the largest, its place, the second largest."""
    best, place = tl.max(score, 1, return_indices=True)
    others = tl.where(tl.arange(0, CODES)[None, :] == place[:, None], float("-inf"), score)
    return best, place, tl.max(others, 1)


@triton.jit
def _hand_over(unsure: tl.tensor, vector: tl.tensor, which: tl.tensor) -> None:
    """Appends to the list, whose first entry is how many there are."""
    which_ = which.to(tl.int64)
    count = tl.sum(which_, 0)
    if count > 0:
        before = tl.atomic_add(unsure, count)
        tl.store(unsure + before + tl.cumsum(which_, 0), vector, mask=which)


@triton.jit
def to_double(x: tl.tensor) -> tl.tensor:
    """By way of float32 from less: from bfloat16 there is no other."""
    if x.dtype == tl.float64:
        return x
    return x.to(tl.float32).to(tl.float64)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_by_vector(
    z: tl.tensor,
    z_row: tl.tensor,
    z_column: tl.tensor,
    table: tl.tensor,
    biases: tl.tensor,
    lengths: tl.tensor,
    quantized: tl.tensor,
    indices: tl.tensor,
    unsure: tl.tensor,
    N: tl.tensor,
    layers: tl.tensor,
    tiles: tl.tensor,
    M: tl.constexpr,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    STRICT: tl.constexpr,
    TILES: tl.constexpr,
    VECTORS: tl.constexpr,
    CODES: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """Codes and sums of VECTORS vectors, a book a vector. BD holds all of D, TILES all of `tiles`."""
    OWN: tl.constexpr = VECTORS if STRICT else 1
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    d = tl.arange(0, BD)
    inside = vector < N
    here = inside[:, None] & (d < D)[None, :]
    x = tl.load(places(z, vector[:, None], d[None, :], z_row, z_column, D, DENSE), mask=here, other=0).to(tl.float32)
    finite = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 1) == 0
    residual = tl.where(finite[:, None], x, 0)
    length = tl.sqrt(tl.sum(residual * residual, 1)) * 1.0001
    total = tl.zeros([VECTORS, BD], tl.float32)
    book = tl.zeros([OWN], tl.int64)
    sure = vector >= 0
    for layer in range(0, layers):
        best = tl.full([VECTORS], float("-inf"), tl.float32)
        second = tl.full([VECTORS], float("-inf"), tl.float32)
        code = tl.zeros([VECTORS], tl.int32)
        for first in range(0, M, CODES):
            k = first + tl.arange(0, CODES)
            row = book[:, None] * M + k[None, :]
            there = (k < M)[None, :, None] & (d < D)[None, None, :]
            e = tl.load(table + row[:, :, None] * D + d[None, None, :], mask=there, other=0)
            bias = tl.load(biases + row, mask=(k < M)[None, :], other=float("-inf"))
            score = tl.sum(residual[:, None, :] * e, 2) + bias
            score = tl.where(score > float("-inf"), score, float("-inf"))  # NaN never wins
            top, place, runner_up = _two_best(score, CODES)
            second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, top))
            code = tl.where(top > best, first + place, code)
            best = tl.maximum(best, top)
        t = tl.arange(0, TILES)
        entry = lengths + (book[:, None] * tiles + t[None, :]) * 2
        longest = tl.max(tl.load(entry, mask=(t < tiles)[None, :], other=0), 1)
        shortest = tl.min(tl.load(entry + 1, mask=(t < tiles)[None, :], other=float("inf")), 1)
        reach = _reach(length, longest, shortest)
        sure = sure & (best - second > _margin(D, layer, length, longest, reach))
        length += reach
        code = tl.where(finite, code, 0)
        tl.store(indices + vector * layers + layer, code.to(tl.int64), mask=inside)
        chosen = book * M + code
        e = tl.load(table + chosen[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0)
        residual -= e
        total += e
        if STRICT:
            book = chosen + 1
        else:
            book += 1
    total = tl.where(finite[:, None], total, float("nan"))
    to = quantized + vector[:, None] * D + d[None, :]
    tl.store(to, total.to(quantized.dtype.element_ty), mask=here)
    _hand_over(unsure, vector, inside & finite & ~sure)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def scan_by_tile(
    z: tl.tensor,
    z_row: tl.tensor,
    z_column: tl.tensor,
    table: tl.tensor,
    biases: tl.tensor,
    lengths: tl.tensor,
    scratch: tl.tensor,
    quantized: tl.tensor,
    indices: tl.tensor,
    unsure: tl.tensor,
    N: tl.tensor,
    layers: tl.tensor,
    tiles: tl.tensor,
    M: tl.constexpr,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    LAYERED: tl.constexpr,
    TILES: tl.constexpr,
    VECTORS: tl.constexpr,
    CODES: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """Codes and sums of every num_programs-th block of VECTORS vectors, all of which search the same book.

    LAYERED: there is more than one layer, and `scratch` holds (2, VECTORS, D) floats a program: residuals, and sums of
    codewords. Threads hand these to one another, hence the barriers.
    """
    v, lane = tl.arange(0, VECTORS), tl.arange(0, CODES)
    program = tl.program_id(0).to(tl.int64)
    residuals = scratch + program * 2 * VECTORS * D + v[:, None] * D
    totals = residuals + VECTORS * D
    # Not tl.cdiv, whose sum can leave the 32 bits that N may have.
    for block in range(tl.program_id(0), (N - 1) // VECTORS + 1, tl.num_programs(0)):
        vector = tl.cast(block, tl.int64) * VECTORS + v
        inside = vector < N
        squares = tl.zeros([VECTORS], tl.float32)
        bad = tl.zeros([VECTORS], tl.int32)
        for begin in range(0, D, BD):
            d = (begin + tl.arange(0, BD))[None, :]
            at = places(z, vector[:, None], d, z_row, z_column, D, DENSE)
            x = tl.load(at, mask=inside[:, None] & (d < D), other=0).to(tl.float32)
            bad = tl.maximum(bad, tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 1))
            squares += tl.sum(x * x, 1)
            if LAYERED:
                tl.store(residuals + d, x, mask=d < D)
        if LAYERED:
            tl.debug_barrier()
        finite = bad == 0
        length = tl.sqrt(squares) * 1.0001
        sure = inside
        for layer in range(0, layers):
            best = tl.full([VECTORS], float("-inf"), tl.float32)
            second = tl.full([VECTORS], float("-inf"), tl.float32)
            code = tl.zeros([VECTORS], tl.int32)
            row = (tl.zeros([], tl.int64) + layer) * M
            book = table + row * D
            for first in range(0, M, CODES):
                k = first + lane
                score = tl.zeros([VECTORS, CODES], tl.float32)
                for begin in range(0, D, BD):
                    d = begin + tl.arange(0, BD)
                    if LAYERED:
                        x = tl.load(residuals + d[None, :], mask=(d < D)[None, :], other=0)
                    else:
                        here = inside[:, None] & (d < D)[None, :]
                        at = places(z, vector[:, None], d[None, :], z_row, z_column, D, DENSE)
                        x = tl.load(at, mask=here, other=0).to(tl.float32)
                    there = (k < M)[None, :] & (d < D)[:, None]
                    e = tl.load(book + k[None, :].to(tl.int64) * D + d[:, None], mask=there, other=0)
                    score = tl.dot(x, e, score, input_precision="ieee")
                bias = tl.load(biases + row + k, mask=k < M, other=float("-inf"))
                score += bias[None, :]
                score = tl.where(score > float("-inf"), score, float("-inf"))  # NaN never wins
                top, place, runner_up = _two_best(score, CODES)
                second = tl.maximum(tl.maximum(second, runner_up), tl.minimum(best, top))
                code = tl.where(top > best, first + place, code)
                best = tl.maximum(best, top)
            t = tl.arange(0, TILES)[None, :]
            entry = lengths + (layer * tiles + t) * 2
            longest = tl.max(tl.load(entry, mask=t < tiles, other=0), 1)
            shortest = tl.min(tl.load(entry + 1, mask=t < tiles, other=float("inf")), 1)
            reach = _reach(length, longest, shortest)
            sure = sure & (best - second > _margin(D, layer, length, longest, reach))
            length += reach
            code = tl.where(finite, code, 0)
            tl.store(indices + vector * layers + layer, code.to(tl.int64), mask=inside)
            if LAYERED:
                tl.debug_barrier()
            for begin in range(0, D, BD):
                d = (begin + tl.arange(0, BD))[None, :]
                total = tl.load(book + code[:, None].to(tl.int64) * D + d, mask=d < D, other=0)
                if LAYERED:
                    x = tl.load(residuals + d, mask=d < D, other=0)
                    tl.store(residuals + d, x - total, mask=d < D)
                    if layer > 0:
                        total += tl.load(totals + d, mask=d < D, other=0)
                    tl.store(totals + d, total, mask=d < D)
                if layer == layers - 1:
                    sums = tl.where(finite[:, None], total, float("nan")).to(quantized.dtype.element_ty)
                    tl.store(quantized + vector[:, None] * D + d, sums, mask=inside[:, None] & (d < D))
            if LAYERED:
                tl.debug_barrier()
        _hand_over(unsure, vector, inside & finite & ~sure)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def decide(
    z: tl.tensor,
    z_row: tl.tensor,
    z_column: tl.tensor,
    table: tl.tensor,
    quantized: tl.tensor,
    indices: tl.tensor,
    unsure: tl.tensor,
    N: tl.tensor,
    layers: tl.tensor,
    M: tl.constexpr,
    D: tl.constexpr,
    DENSE: tl.constexpr,
    STRICT: tl.constexpr,
    ALL: tl.constexpr,
    VECTORS: tl.constexpr,
    CODES: tl.constexpr,
    BD: tl.constexpr,
) -> None:
    """Codes and sums by distances in float64, of the vectors on the list, or of ALL. BD holds all of D.

    Distances are those of csrc's `decide` bit for bit: summed term by term, each product and sum rounded. So this is to
    be compiled with nothing fused. A tree of sums, or a fused product, would part distances that are equal there.
    """
    OWN: tl.constexpr = VECTORS if STRICT else 1
    d = tl.arange(0, BD)
    count = N if ALL else tl.load(unsure)
    programs = tl.num_programs(0).to(tl.int64)
    for start in range(tl.program_id(0).to(tl.int64) * VECTORS, count, programs * VECTORS):
        vector = start + tl.arange(0, VECTORS)
        inside = vector < count
        if not ALL:
            vector = tl.load(unsure + 1 + vector, mask=inside, other=0)
        here = inside[:, None] & (d < D)[None, :]
        x = tl.load(places(z, vector[:, None], d[None, :], z_row, z_column, D, DENSE), mask=here, other=0)
        x = to_double(x)
        finite = tl.max((~(tl.abs(x) < float("inf"))).to(tl.int32), 1) == 0
        residual = tl.where(finite[:, None], x, 0)
        total = tl.zeros([VECTORS, BD], table.dtype.element_ty)
        book = tl.zeros([OWN], tl.int64)
        for layer in range(0, layers):
            least = tl.full([VECTORS], float("inf"), tl.float64)
            code = tl.zeros([VECTORS], tl.int32)
            for first in range(0, M, CODES):
                k = first + tl.arange(0, CODES)
                there = (k < M)[None, :]
                codewords = table + (book[:, None] * M + k[None, :]) * D
                distance = tl.zeros([VECTORS, CODES], tl.float64)
                for component in range(0, D):
                    own = tl.sum(tl.where(d[None, :] == component, residual, 0), 1)  # of one number and zeros: exact
                    off = own[:, None] - tl.load(codewords + component, mask=there, other=0).to(tl.float64)
                    distance += off * off
                won = there & (distance < float("inf"))  # NaN and infinity never win
                near, place = tl.min(tl.where(won, distance, float("inf")), 1, return_indices=True)
                code = tl.where(near < least, first + place, code)  # of equals the first
                least = tl.minimum(least, near)
            code = tl.where(finite, code, 0)
            tl.store(indices + vector * layers + layer, code.to(tl.int64), mask=inside)
            chosen = book * M + code
            e = tl.load(table + chosen[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0)
            residual -= e.to(tl.float64)
            total += e
            if STRICT:
                book = chosen + 1
            else:
                book += 1
        total = tl.where(finite[:, None], total, float("nan"))
        tl.store(quantized + vector[:, None] * D + d[None, :], total.to(quantized.dtype.element_ty), mask=here)
