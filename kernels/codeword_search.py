"""codeword_search on a GPU in Triton: what is launched, on how much at a time, with which memory.

A search is three launches: `measure_codewords`, a scan of all vectors in float32, and `decide`, in float64, of the
vectors that the scan was not sure of (codeword_search_scan.py). Vectors of float64 go to `decide` at once. Sums over
vectors take a sort and two launches a layer collected: of a tree the leaves alone (codeword_search_sums.py).

Bytes a vector of s each: 2 D s + 8 n for a search; z and indices once more for statistics; 3 D s + 8 n for the gradient
of z. Operations: n M (2 D + 2). Memory beside inputs and outputs: copies of the codebooks, 8 bytes a vector in a
search, and in training 16 beside what a sort takes.

Which sizes a launch takes is a function of the problem alone, so that results are repeatable and nothing is measured at
a first call.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vpfast.kernels._ahead_of_time import Compilation
from vpfast.kernels.codeword_search_scan import (
    MEASURED_TOGETHER,
    UNSPECIALIZED,
    decide,
    measure_codewords,
    scan_by_tile,
    scan_by_vector,
)
from vpfast.kernels.codeword_search_sums import add_chunks, climb, collect, find_rows, pull_rows, pull_vectors


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _pow2(x: int) -> int:
    """The lowest power of two that is not below."""
    return 1 << (x - 1).bit_length()


class _Books(NamedTuple):
    """All codebooks as one table in the working type, layer 1 first. `strict_tree` says whether there is a tree: not
    with one layer alone."""

    table: Tensor
    sizes: tuple[int, ...]
    D: int
    M: int
    strict_tree: bool

    @property
    def layers(self) -> int:
        return len(self.sizes)

    @property
    def constants(self) -> dict[str, int]:
        """What kernels are compiled for: so they know how codewords are aligned."""
        return {"M": self.M, "D": self.D}

    @property
    def books(self) -> int:
        """How many codebooks there are in all layers."""
        return len(self.table) // self.M

    def first_row(self, layer: int) -> int:
        return sum(self.sizes[:layer])

    def of_layer(self, layer: int, values: Tensor) -> Tensor:
        """Of a tensor with a row for each codeword, the layer's."""
        return values.narrow(0, self.first_row(layer), self.sizes[layer])


def _books(codebooks: Sequence[Tensor], z_type: torch.dtype, strict_tree: bool) -> _Books:
    """Checked, for nothing to be read out of bounds: the public function has told the user what is wrong."""
    if not 1 <= len(codebooks) <= 16:
        raise RuntimeError(f"codeword_search: 1 to 16 codebooks, got {len(codebooks)}")
    dtype = _working(z_type)
    if codebooks[0].dtype not in (z_type, dtype):
        raise RuntimeError("codeword_search: codebooks must have the type of z, or float32 beside half precision")
    M, D = codebooks[0].shape
    sizes = tuple(M ** (layer + 1) if strict_tree else M for layer in range(len(codebooks)))
    if sizes[-1] >= 2**31:
        raise RuntimeError("codeword_search: a layer holds fewer than 2^31 codewords")
    for layer, (codebook, size) in enumerate(zip(codebooks, sizes, strict=True), 1):
        _check(f"layer {layer} of codebooks", codebook, codebooks[0].dtype, size, D)
    return _Books(_in_one(codebooks).to(dtype), sizes, D, M, strict_tree and len(sizes) > 1)


def _in_one(codebooks: Sequence[Tensor]) -> Tensor:
    """Copied, unless they already lie one after another."""
    first, place = codebooks[0], codebooks[0].storage_offset()
    for codebook in codebooks:
        same = codebook.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and codebook.is_contiguous() and codebook.storage_offset() == place):
            return torch.cat(list(codebooks))
        place += codebook.numel()
    rows = sum(len(codebook) for codebook in codebooks)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise RuntimeError(f"codeword_search: {name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}

_would_launch: list[Compilation] = []
"""What `ahead_of_time` reads: the launches that tensors on the meta device came to."""


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 3,
    fused: int = True,
    **constants: int | bool | str,
) -> None:
    if isinstance(arguments[0], Tensor) and arguments[0].is_meta:
        compilation = _compilation(kernel, arguments, constants, num_warps, num_stages)
        _would_launch.append(compilation._replace(fused=bool(fused)))
    else:
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=bool(fused))


def _compilation(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, int | bool | str], num_warps: int, num_stages: int
) -> Compilation:
    """As Triton makes it of a launch: a number that is 1 is a constant, but for some."""
    signature: dict[str, str] = {}
    fixed: dict[str, object] = dict(constants)
    divisible = []
    for name, argument in zip(kernel.arg_names, arguments, strict=False):
        if isinstance(argument, Tensor):
            signature[name] = "*" + _TYPES[argument.dtype]
        elif name in UNSPECIALIZED or argument != 1:
            signature[name] = "i32" if argument < 2**31 else "i64"
        else:
            fixed[name] = argument
        if isinstance(argument, Tensor) or (name not in UNSPECIALIZED and argument % 16 == 0):
            divisible.append(name)
    ordered = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return Compilation("", kernel, ordered, fixed, num_warps, num_stages, tuple(divisible))


def _is_dense(vectors: Tensor) -> bool:
    return vectors.stride() == (vectors.shape[1], 1)


# --- how much a program takes -----------------------------------------------------------------------------------------


def _tile(books: _Books, elements: int, vectors: int) -> dict[str, int]:
    """Whole vectors, `vectors` at most, beside as many codewords as make `elements` numbers."""
    BD = _pow2(books.D)
    codes = min(_pow2(books.M), max(1, elements // BD))
    return {"VECTORS": max(1, min(vectors, elements // (BD * codes))), "CODES": codes, "BD": BD}


def _warps(*sizes: int) -> int:
    """Warps of a program that holds a tile of such sizes: 32 numbers a thread, while threads last."""
    return min(16, max(4, _pow2(_cdiv(math.prod(sizes), 1024))))


def _few_codewords(books: _Books) -> bool:
    """Does each vector look at a run of its own, or all at the same tiles?"""
    return books.strict_tree or books.M <= 32


def _processors(device: torch.device) -> int:
    """Of a GPU that is not here those of an H100 or H200."""
    if device.type != "cuda":
        return 132
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


# --- the search -------------------------------------------------------------------------------------------------------


def _search(z: Tensor, books: _Books) -> tuple[Tensor, Tensor]:
    quantized = torch.empty_like(z, memory_format=torch.contiguous_format)
    indices = z.new_empty((len(z), books.layers), dtype=torch.int64)
    if not len(z):
        return quantized, indices
    if z.dtype == torch.float64:
        _decide(z, books, quantized, indices, None)
        return quantized, indices
    unsure = indices.new_empty(1 + len(z))  # how many, and which
    measures = _measure(books, unsure)
    scan = _scan_by_vector if _few_codewords(books) else _scan_by_tile
    scan(z, books, *measures, quantized, indices, unsure)
    _decide(z, books, quantized, indices, unsure)
    return quantized, indices


def _measure(books: _Books, unsure: Tensor) -> tuple[Tensor, Tensor, int]:
    tiles = _cdiv(books.M, MEASURED_TOGETHER)
    biases = books.table.new_empty(len(books.table))
    lengths = books.table.new_empty((books.books, tiles, 2))
    codes = min(_pow2(books.M), MEASURED_TOGETHER)
    together = MEASURED_TOGETHER // codes
    _launch(
        measure_codewords,
        (_cdiv(books.books, together) * tiles,),
        *(books.table, biases, lengths, unsure, books.books, tiles),
        **books.constants,
        BOOKS=together,
        CODES=codes,
        BD=min(_pow2(books.D), 32),
    )
    return biases, lengths, tiles


def _scan_by_vector(
    z: Tensor,
    books: _Books,
    biases: Tensor,
    lengths: Tensor,
    tiles: int,
    quantized: Tensor,
    indices: Tensor,
    unsure: Tensor,
) -> None:
    sizes = _tile(books, 4096, 128)
    _launch(
        scan_by_vector,
        (_cdiv(len(z), sizes["VECTORS"]),),
        *(z, *z.stride(), books.table, biases, lengths, quantized, indices, unsure, len(z), books.layers, tiles),
        **books.constants,
        **sizes,
        DENSE=_is_dense(z),
        STRICT=books.strict_tree,
        TILES=_pow2(tiles),
        num_warps=_warps(*sizes.values()),
    )


def _scan_by_tile(
    z: Tensor,
    books: _Books,
    biases: Tensor,
    lengths: Tensor,
    tiles: int,
    quantized: Tensor,
    indices: Tensor,
    unsure: Tensor,
) -> None:
    processors, layered = _processors(z.device), books.layers > 1
    vectors = 64 if len(z) >= 64 * processors else 32  # with fewer all processors have some
    programs = _cdiv(len(z), vectors)
    if layered:  # as many as run at a time, as each has memory of its own
        programs = min(programs, 2 * processors)
    scratch = books.table.new_empty((programs, 2, vectors, books.D) if layered else 0)
    _launch(
        scan_by_tile,
        (programs,),
        *(z, *z.stride(), books.table, biases, lengths, scratch, quantized, indices, unsure),
        *(len(z), books.layers, tiles),
        **books.constants,
        DENSE=_is_dense(z),
        LAYERED=layered,
        TILES=_pow2(tiles),
        VECTORS=vectors,
        CODES=64,
        BD=16,  # what a product takes at least: a thread holds this much of four vectors and four codewords
        num_warps=vectors // 8,
        num_stages=3 if vectors == 64 else 2,
    )


_DECIDING = 1024
"""Programs that wait for unsure vectors: enough to fill any GPU, few enough to be over at once where there are none."""


def _decide(z: Tensor, books: _Books, quantized: Tensor, indices: Tensor, unsure: Tensor | None) -> None:
    """Of the vectors that are listed, or of all. Listed ones are few: as many codewords at a time as registers allow,
    so that no program lasts long. All share what a program reads of large codebooks."""
    BD = _pow2(books.D)
    codes = min(_pow2(books.M), 64 if unsure is None else 1024 if BD <= 256 else 512)
    vectors = max(1, min(16, 512 // max(codes, BD)))
    _launch(
        decide,
        (min(_DECIDING, _cdiv(len(z), vectors)),),
        *(z, *z.stride(), books.table, quantized, indices, indices if unsure is None else unsure),
        *(len(z), books.layers),
        **books.constants,
        DENSE=_is_dense(z),
        STRICT=books.strict_tree,
        ALL=unsure is None,
        VECTORS=vectors,
        CODES=codes,
        BD=BD,
        num_warps=8 if codes > 64 and BD <= 256 else _warps(vectors, BD),
        fused=False,
    )


# --- sums over vectors ------------------------------------------------------------------------------------------------


class _Chunks(NamedTuple):
    """The vectors of one layer in the order of their rows, cut into chunks: see codeword_search_sums.py."""

    order: Tensor  # (N,) vectors
    starts: Tensor  # (rows + 1,): where in `order` a row starts
    first_chunks: Tensor  # (rows + 1,): the first chunk of a row
    rows: Tensor  # of each chunk, the number of rows where it is not used
    length: int


def _chunks(indices: Tensor, books: _Books, layer: int) -> _Chunks:
    N, rows = len(indices), books.sizes[layer]
    keys = indices.new_empty(N, dtype=torch.int32)
    find = {"M": books.M, "STRICT": books.strict_tree, "VECTORS": 1024}
    _launch(find_rows, (_cdiv(N, 1024),), indices, keys, N, books.layers, layer, **find)
    keys, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(keys, torch.arange(rows + 1, device=keys.device, dtype=torch.int32))
    length = max(8, min(32, 4096 // _pow2(books.D)))
    first_chunks = torch.nn.functional.pad(((starts.diff() + length - 1) // length).cumsum(0), (1, 0))
    chunks = torch.arange(N // length + min(rows, N), device=keys.device)
    return _Chunks(order, starts, first_chunks, torch.searchsorted(first_chunks[1:], chunks, right=True), length)


class _Sums(NamedTuple):
    """Of a layer's rows in float64: (rows, D), (rows,). `errors` as `collect` says, added up."""

    sums: Tensor
    counts: Tensor
    errors: Tensor


def _collect(
    kind: str, source: Tensor, indices: Tensor, books: _Books, layer: int, weights: Tensor | None = None
) -> _Sums:
    """Of the rows of layer `layer`; `kind` is one that `collect` knows."""
    rows, measured, table = books.sizes[layer], kind == "measured", books.table
    order, starts, first_chunks, of_row, length = _chunks(indices, books, layer)
    chunks, BD = len(of_row), _pow2(books.D)
    sums = table.new_empty((chunks, books.D))
    counts = indices.new_empty(chunks if measured else 0, dtype=torch.int32)
    errors = table.new_empty((chunks if measured else 0, books.layers if books.strict_tree else 1))
    group = max(1, 16384 // (length * BD * table.itemsize))
    _launch(
        collect,
        (_cdiv(chunks, group),),
        *(source, *source.stride(), indices, table, table if weights is None else weights),
        *(order, starts, first_chunks, of_row, sums, counts, errors, chunks, rows, books.layers, layer),
        **books.constants,
        DENSE=_is_dense(source),
        KIND=kind,
        STRICT=books.strict_tree,
        GROUP=group,
        LENGTH=length,
        BD=BD,
        num_warps=4 if BD <= 128 else 8,
    )
    row_sums = sums.new_empty((rows, books.D), dtype=torch.float64)
    row_counts = sums.new_empty(rows if measured else 0, dtype=torch.float64)
    columns = min(BD, 64)
    together = max(1, 2048 // (16 * columns))
    _launch(
        add_chunks,
        (_cdiv(rows, together), _cdiv(books.D, columns)),
        *(sums, counts, first_chunks, row_sums, row_counts, rows),
        D=books.D,
        COUNTED=measured,
        GROUP=together,
        LENGTH=16,
        BD=columns,
    )
    return _Sums(row_sums, row_counts, errors.sum(0, dtype=torch.float64))


def _over_rows(rows: int, D: int) -> tuple[tuple[int, int], dict[str, int]]:
    """A grid over (rows, D), and the sizes of a program."""
    columns = min(_pow2(D), 64)
    together = 1024 // columns
    return (_cdiv(rows, together), _cdiv(D, columns)), {"D": D, "ROWS": together, "BD": columns}


def _climb(books: _Books, leaves: _Sums, sums: Sequence[Tensor], counts: Sequence[Tensor] | None) -> None:
    """Fills in the sums of every layer of a tree, and with `counts` its statistics."""
    below, counts_below = leaves.sums, leaves.counts
    for layer in reversed(range(books.layers)):
        here = below.new_empty((books.sizes[layer], books.D))
        counts_here = below.new_empty(books.sizes[layer] if counts else 0)
        grid, sizes = _over_rows(*here.shape)
        _launch(
            climb,
            grid,
            *(below, counts_below, books.of_layer(layer, books.table), here, counts_here),
            *(sums[layer], counts[layer] if counts else counts_here, len(here)),
            **sizes,
            CHILDREN=1 if layer == books.layers - 1 else books.M,
            COUNTED=counts is not None,
        )
        below, counts_below = here, counts_here


def _pull_rows(books: _Books, weights: Tensor, counts: Tensor, sums: Tensor, gradients: Sequence[Tensor]) -> None:
    """The gradients of a tree's codebooks from its statistics."""
    below = sums.new_empty(0, dtype=torch.float64)
    for layer in reversed(range(books.layers)):
        rows = books.sizes[layer]
        here = below.new_empty((books.layers - layer, rows, books.D))
        grid, sizes = _over_rows(rows, books.D)
        _launch(
            pull_rows,
            grid,
            *(below, *(books.of_layer(layer, values) for values in (books.table, counts, sums))),
            *(weights[layer], here, gradients[layer], rows, books.layers, layer),
            **sizes,
            CHILDREN=books.M,
        )
        below = here


def _pull_vectors(
    z: Tensor, grad: Tensor | None, indices: Tensor, books: _Books, weights: Tensor, grad_z: Tensor
) -> None:
    given, BD = z if grad is None else grad, _pow2(books.D)
    vectors = max(1, min(256, 1024 // BD))
    _launch(
        pull_vectors,
        (_cdiv(len(z), vectors),),
        *(z, *z.stride(), given, *given.stride(), indices, books.table, weights, grad_z, len(z), books.layers),
        **books.constants,
        DENSE=_is_dense(z),
        GIVEN=grad is not None,
        GRAD_DENSE=_is_dense(given),
        STRICT=books.strict_tree,
        VECTORS=vectors,
        BD=BD,
        num_warps=_warps(vectors, BD),
    )


# --- the operators ----------------------------------------------------------------------------------------------------


def codeword_search(z: Tensor, codebooks: list[Tensor], strict_tree: bool) -> tuple[Tensor, Tensor]:
    """(N, D) vectors -> quantized (N, D) and codes (N, n) int64."""
    return _search(z, _books(codebooks, z.dtype, strict_tree))


def codeword_search_train(
    z: Tensor, codebooks: list[Tensor], strict_tree: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The search, with the errors (n,), and counts (R,) and sums (R, D) of the residuals that chose a codeword."""
    books = _books(codebooks, z.dtype, strict_tree)
    quantized, indices = _search(z, books)
    table, rows = books.table, len(books.table)
    if not len(z):
        return quantized, indices, table.new_zeros(books.layers), table.new_zeros(rows), table.new_zeros(rows, books.D)
    counts, sums = table.new_empty(rows), table.new_empty((rows, books.D))
    of_layers = [[books.of_layer(layer, values) for layer in range(books.layers)] for values in (sums, counts)]
    if books.strict_tree:
        leaves = _collect("measured", z, indices, books, books.layers - 1)
        _climb(books, leaves, *of_layers)
        return quantized, indices, leaves.errors.to(table.dtype), counts, sums
    errors = []
    for layer, (layer_sums, layer_counts) in enumerate(zip(*of_layers, strict=True)):
        found = _collect("measured", z, indices, books, layer)
        layer_sums.copy_(found.sums)
        layer_counts.copy_(found.counts)
        errors.append(found.errors)
    return quantized, indices, torch.cat(errors).to(table.dtype), counts, sums


def codeword_search_backward(
    grad_quantized: Tensor, indices: Tensor, codebooks: list[Tensor], strict_tree: bool
) -> list[Tensor]:
    """The gradient of the sum of the chosen codewords, one tensor a codebook."""
    books = _books(codebooks, grad_quantized.dtype, strict_tree)
    _check("grad_quantized", grad_quantized, grad_quantized.dtype, len(grad_quantized), books.D)
    _check("indices", indices, torch.int64, len(grad_quantized), books.layers)
    if not len(indices):
        return [codebook.new_zeros(codebook.shape) for codebook in codebooks]
    indices = indices.contiguous()
    gradients = [codebook.new_empty(codebook.shape) for codebook in codebooks]
    if books.strict_tree:
        leaves = _collect("given", grad_quantized, indices, books, books.layers - 1)
        _climb(books, leaves, gradients, None)
        return gradients
    for layer, gradient in enumerate(gradients):
        gradient.copy_(_collect("given", grad_quantized, indices, books, layer).sums)
    return gradients


def codeword_search_train_backward(
    grad_quantized: Tensor | None,
    weights_z: Tensor,
    weights_codebooks: Tensor,
    z: Tensor,
    indices: Tensor,
    codebooks: list[Tensor],
    counts: Tensor,
    sums: Tensor,
    strict_tree: bool,
) -> tuple[Tensor, list[Tensor]]:
    """grad_z (N, D) and the gradient of each codebook: weighted sums of residuals, see README.md of the operator."""
    grad_z = torch.empty_like(z, memory_format=torch.contiguous_format)
    books = _books(codebooks, z.dtype, strict_tree)
    dtype, rows, layers = books.table.dtype, len(books.table), books.layers
    for name, tensor, of_type, *shape in (
        ("grad_quantized", z if grad_quantized is None else grad_quantized, z.dtype, len(z), books.D),
        ("weights_z", weights_z, dtype, layers),
        ("weights_codebooks", weights_codebooks, dtype, layers, layers),
        ("indices", indices, torch.int64, len(z), layers),
        ("counts", counts, dtype, rows),
        ("sums", sums, dtype, rows, books.D),
    ):
        _check(name, tensor, of_type, *shape)
    if not len(z):
        return grad_z, [codebook.new_zeros(codebook.shape) for codebook in codebooks]
    indices, weights_z, weights_codebooks = (t.contiguous() for t in (indices, weights_z, weights_codebooks))
    _pull_vectors(z, grad_quantized, indices, books, weights_z, grad_z)
    gradients = [codebook.new_empty(codebook.shape) for codebook in codebooks]
    if books.strict_tree:
        _pull_rows(books, weights_codebooks, counts.contiguous(), sums.contiguous(), gradients)
    else:
        for layer, gradient in enumerate(gradients):
            gradient.copy_(_collect("pulled", z, indices, books, layer, weights_codebooks[layer]).sums)
    return grad_z, gradients


# --- what is compiled with no GPU -------------------------------------------------------------------------------------

_PROBLEMS = [  # types of z and codebooks, vectors, D, M, layers, strict_tree
    (torch.float32, torch.float32, 2**17, 8, 8, 3, True),
    (torch.bfloat16, torch.float32, 2**17, 8, 8, 3, True),
    (torch.float16, torch.float16, 2**17, 4, 4, 3, True),
    (torch.float64, torch.float64, 2**17, 8, 8, 3, True),
    (torch.float32, torch.float32, 2**17, 64, 64, 2, True),
    (torch.float32, torch.float32, 2**17, 8, 512, 1, True),
    (torch.bfloat16, torch.bfloat16, 2**17, 64, 8192, 1, True),
    (torch.float32, torch.float32, 2**11, 512, 65536, 1, True),
    (torch.float32, torch.float32, 2**17, 128, 1024, 8, False),
]


def ahead_of_time() -> Iterator[Compilation]:
    """Every kernel as these problems launch it."""
    seen = []
    for z_type, type_, N, D, M, layers, strict_tree in _PROBLEMS:
        _would_launch.clear()
        z = torch.empty((N, D), device="meta", dtype=z_type)
        sizes = [M ** (layer + 1) if strict_tree else M for layer in range(layers)]
        codebooks = [torch.empty((size, D), device="meta", dtype=type_) for size in sizes]
        _, indices, errors, counts, sums = codeword_search_train(z, codebooks, strict_tree)
        codeword_search_backward(z, indices, codebooks, strict_tree)
        weights = errors, errors.expand(layers, layers)
        codeword_search_train_backward(z, *weights, z, indices, codebooks, counts, sums, strict_tree)
        types = f"{_TYPES[z_type]} beside {_TYPES[type_]}"
        form = f"{f'{layers} layers of ' if layers > 1 else ''}{M}{', tree' if strict_tree and layers > 1 else ''}"
        for compilation in _would_launch:
            if compilation not in seen:
                seen.append(compilation)
                told = [f"{k} {v}" for k, v in compilation.constexprs.items() if k in ("KIND", "CHILDREN", "COUNTED")]
                kernel = " ".join((compilation.kernel.__name__, *told)).lower()
                yield compilation._replace(name=f"{kernel}, {types}, D = {D}, {form}")
