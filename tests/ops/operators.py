"""Arguments for every operator of vpfast: what the tests go through that hold of all operators alike.

``test_operators.py`` fails where an operator is registered that is not here.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention import inputs as attention_inputs
from attention import length, options
from codebooks import inputs as codebook_inputs
from torch.utils._pytree import tree_leaves, tree_map_only

from vpfast.models import MSPN, MSPNConfig, SHRVQVAEConfig, STPixelCNN
from vpfast.models.mspn.cpu import TiledMSPN
from vpfast.models.shrvqvae import sample
from vpfast.ops import Mask3d, _native, codeword_search_train


@dataclass(frozen=True)
class Problem:
    """An operator and what it is called with, at any scale: 1 is small, 4 enough for several threads; and 0 empty, for
    operators that write into nothing."""

    operator: str
    make: Callable[[int, int], tuple[Any, ...]]
    differentiable_in: tuple[str, ...] = ()

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.vpfast, self.operator).default

    @property
    def names(self) -> list[str]:
        return [argument.name for argument in self.overload._schema.arguments]

    @property
    def writes(self) -> bool:
        """Does it write into tensors that it is given? Those operators the models alone call, with memory of theirs."""
        return self.overload._schema.is_mutable

    def arguments(self, scale: int = 1, seed: int = 0) -> tuple[Any, ...]:
        return self.make(scale, seed)


def results(problem: Problem, arguments: tuple[Any, ...]) -> list[Any]:
    """What the operator returns and what it writes, flat; ``arguments`` stay as they are. Threads are torch's."""
    given, written = list(copy.deepcopy(arguments)), []
    for index, argument in enumerate(problem.overload._schema.arguments):
        if argument.name == "threads":
            given[index] = torch.get_num_threads()
        if argument.is_write:
            written.append(given[index])
    return tree_leaves([problem.overload(*given), written])


def same(found: list[Any], expected: list[Any]) -> bool:
    """To the bit, NaN as itself."""
    return len(found) == len(expected) and all(map(_same, found, expected))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return bool(a == b)
    if a.is_floating_point():
        return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    return a.dtype == b.dtype and torch.equal(a, b)


# --- layouts ----------------------------------------------------------------------------------------------------------


def _transposed(t: torch.Tensor) -> torch.Tensor:
    backwards = tuple(reversed(range(t.dim())))
    return t.permute(backwards).contiguous().permute(backwards)


def _sliced(t: torch.Tensor) -> torch.Tensor:
    view = t.new_zeros([2 * size for size in t.shape])[(slice(None, None, 2),) * t.dim()]
    return view.copy_(t)


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _unaligned(t: torch.Tensor) -> torch.Tensor:
    return t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": _transposed,
    "sliced": _sliced,
    "expanded": lambda t: t[:1].expand(t.shape),
    "channels_last": _channels_last,
    "unaligned": _unaligned,
}


def laid_out(arguments: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    """The arguments with every tensor in that layout, and of the same numbers but where the layout repeats some."""
    return tree_map_only(torch.Tensor, LAYOUTS[layout], arguments)


# --- edlstm_gates -----------------------------------------------------------------------------------------------------


def _gates(scale: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    batch, channels, size = min(3, scale), 4 * scale**2 or 4, (3 * scale + 1, 4 * scale + 2)
    gates, *cells = (torch.randn(batch, n * channels, *size, generator=generator) for n in (4, 1, 1, 1))
    return gates, *cells


def _edlstm_gates(scale: int, seed: int) -> tuple[Any, ...]:
    gates, c_prev, *_ = _gates(scale, seed)
    return gates, c_prev, "ifog"


def _edlstm_gates_backward(scale: int, seed: int) -> tuple[Any, ...]:
    gates, c_prev, grad_h, grad_c = _gates(scale, seed)
    return grad_h, grad_c, gates, c_prev, "ifog"


def _edlstm_gates_backward_of_c(scale: int, seed: int) -> tuple[Any, ...]:
    return None, *_edlstm_gates_backward(scale, seed)[1:]


# --- codeword_search --------------------------------------------------------------------------------------------------

_Sizes = tuple[int, int, int, bool]  # dim, size of a codebook, layers, strict_tree
TREE: _Sizes = (8, 8, 3, True)
FLAT: _Sizes = (16, 300, 2, False)


def _search(sizes: _Sizes, scale: int, seed: int) -> tuple[Any, ...]:
    return *codebook_inputs(80 * scale**3, *sizes, seed=seed), sizes[-1]


def _losses(sizes: _Sizes, scale: int, seed: int) -> tuple[Any, ...]:
    return *_search(sizes, scale, seed), True


def _search_backward(sizes: _Sizes, scale: int, seed: int) -> tuple[Any, ...]:
    z, codebooks, strict_tree = _search(sizes, scale, seed)
    return z.flip(0), codeword_search_train(z, codebooks, strict_tree).indices, codebooks, strict_tree


def _train_backward(sizes: _Sizes, scale: int, seed: int) -> tuple[Any, ...]:
    z, codebooks, strict_tree = _search(sizes, scale, seed)
    found = codeword_search_train(z, codebooks, strict_tree)
    n, generator = len(codebooks), torch.Generator().manual_seed(seed)
    weights = torch.randn(n, generator=generator), torch.randn(n, n, generator=generator).triu()
    return z.flip(0), *weights, z, found.indices, codebooks, found.counts, found.sums, strict_tree


def _train_backward_without_quantized(sizes: _Sizes, scale: int, seed: int) -> tuple[Any, ...]:
    return None, *_train_backward(sizes, scale, seed)[1:]


# --- masked_attention3d -----------------------------------------------------------------------------------------------

MASKS = {"raster": Mask3d("raster"), "eq6": Mask3d("eq6", (None, 5, 5))}


def _attention(mask: str, scale: int, seed: int) -> tuple[Any, ...]:
    grid = (scale + 1 if scale else 0, 2 * scale + 1, 2 * scale + 3)
    q, k, v = attention_inputs(grid, 6 * scale or 6, 2, 3, seed=seed, count=3)
    return q, k, v, *options(q, grid, MASKS[mask])


def _attention_backward(mask: str, scale: int, seed: int) -> tuple[Any, ...]:
    q, k, v, *rules = _attention(mask, scale, seed)
    out, lse = torch.ops.vpfast.masked_attention3d(q, k, v, *rules)
    return q.flip(2), q, k, v, out, lse, *rules


def _decode(mask: str, scale: int, seed: int) -> tuple[Any, ...]:
    q, k, v, grid, *rules = _attention(mask, scale, seed)
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(max(1, length(grid)), (min(length(grid), 9 * scale),), generator=generator)
    return q[:, :, positions], k, v, positions, grid, *rules


# --- plane_convolution ------------------------------------------------------------------------------------------------


def _planes(scale: int, seed: int) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, the gradient of y."""
    generator, width = torch.Generator().manual_seed(seed), 16 * (scale // 2) or 8
    size = (4 * scale + 4, width)
    shapes = (scale, 15, *size), (21, 15, 3, 3), (21,), (scale, 21, *size)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _plane_convolution(scale: int, seed: int) -> tuple[Any, ...]:
    return *_planes(scale, seed)[:3], False


def _plane_convolution_of_gradients(scale: int, seed: int) -> tuple[Any, ...]:
    _, weight, _, grad = _planes(scale, seed)
    return grad, weight, None, True


def _plane_convolution_weight(scale: int, seed: int) -> tuple[Any, ...]:
    x, _, _, grad = _planes(scale, seed)
    return grad, x, 3, 3


# --- winograd_convolution ---------------------------------------------------------------------------------------------


def _wide(scale: int, seed: int) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, an addend, the gradient of y."""
    generator, size = torch.Generator().manual_seed(seed), (3 * scale + 2, 4 * scale + 1)
    shapes = (scale, 51, *size), (70, 51, 3, 3), (70,), (scale, 70, *size), (scale, 70, *size)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _winograd_weights(transposed: bool, scale: int, seed: int) -> tuple[Any, ...]:
    return _wide(scale, seed)[1], transposed


def _winograd_convolution(scale: int, seed: int) -> tuple[Any, ...]:
    x, weight, bias, added, _ = _wide(scale, seed)
    return x, torch.ops.vpfast.winograd_weights(weight, False), bias, added, 0.1, len(weight)


def _winograd_convolution_of_gradients(scale: int, seed: int) -> tuple[Any, ...]:
    x, weight, _, _, grad = _wide(scale, seed)
    return grad, torch.ops.vpfast.winograd_weights(weight, True), None, None, 1.0, x.shape[1]


def _winograd_convolution_weight(scale: int, seed: int) -> tuple[Any, ...]:
    x, _, _, _, grad = _wide(scale, seed)
    return grad, x


# --- what the models alone call ---------------------------------------------------------------------------------------


def _last_call(operator: str, program: Callable[[], object]) -> tuple[Any, ...]:
    """The arguments of the last call of ``operator`` in ``program``, as they were before it."""
    calls: list[tuple[Any, ...]] = []
    original = getattr(torch.ops.vpfast, operator)

    def listen(*given: Any) -> Any:
        calls.append(copy.deepcopy(given))
        return original(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.vpfast, operator, listen)
        patch.setattr(torch.compiler, "is_compiling", lambda: operator == "sample_frame")
        program()
    return calls[-1]


@functools.cache
def _prior() -> STPixelCNN:
    torch.manual_seed(1)
    sizes = {"prior_channels": 24, "prior_blocks": 2, "prior_heads": 3, "prior_head_dim": 5, "prior_attention_every": 1}
    prior = STPixelCNN(SHRVQVAEConfig(in_channels=1, channels=(8,), codebook_size=3, layers=2, **sizes)).eval()
    for parameter in prior.parameters():
        parameter.requires_grad_(False).mul_(1.5)  # far from uniform
    return prior


def _sampler(operator: str, scale: int, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(3, (2, 1, 2 * scale + 1, 3, 2), generator=generator)
    return _last_call(operator, lambda: sample(_prior(), codes, 1))


@functools.cache
def _tiled() -> TiledMSPN:
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, channels=(12, 20, 36), levels=2, hidden_channels=10)).eval()
    return TiledMSPN(model, None)


def _tile_program(scale: int, seed: int) -> tuple[Any, ...]:
    tiled, height, width = _tiled(), 8 * scale, 16
    frame = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(seed))
    return _last_call("tile_program", lambda: tiled.step(frame, tiled.init_state(2, height, width)))


# --- all of them ------------------------------------------------------------------------------------------------------


def _each(name: str, make: Callable[..., tuple[Any, ...]], options: dict[str, Any], *leaves: str) -> dict[str, Problem]:
    return {f"{name}, {key}": Problem(name, functools.partial(make, option), leaves) for key, option in options.items()}


_SIZES, _MASKS = {"tree": TREE, "flat": FLAT}, {name: name for name in MASKS}

PROBLEMS = {
    "edlstm_gates": Problem("edlstm_gates", _edlstm_gates, ("gates", "c_prev")),
    "edlstm_gates_backward": Problem("edlstm_gates_backward", _edlstm_gates_backward),
    "edlstm_gates_backward, of c": Problem("edlstm_gates_backward", _edlstm_gates_backward_of_c),
    **_each("codeword_search", _search, _SIZES, "z", "codebooks"),
    **_each("codeword_search_backward", _search_backward, _SIZES),
    **_each("codeword_search_train", _search, _SIZES),
    **_each("codeword_search_train_backward", _train_backward, _SIZES),
    **_each("codeword_search_train_backward", _train_backward_without_quantized, {"of the losses": TREE}),
    **_each("codeword_search_losses", _losses, _SIZES, "z", "codebooks"),
    **_each("masked_attention3d", _attention, _MASKS, "q", "k", "v"),
    **_each("masked_attention3d_backward", _attention_backward, _MASKS),
    **_each("masked_attention3d_decode", _decode, _MASKS),
    "plane_convolution": Problem("plane_convolution", _plane_convolution),
    "plane_convolution, of gradients": Problem("plane_convolution", _plane_convolution_of_gradients),
    "plane_convolution_weight": Problem("plane_convolution_weight", _plane_convolution_weight),
    **_each("winograd_weights", _winograd_weights, {"as it is": False, "transposed": True}),
    "winograd_convolution": Problem("winograd_convolution", _winograd_convolution),
    "winograd_convolution, of gradients": Problem("winograd_convolution", _winograd_convolution_of_gradients),
    "winograd_convolution_weight": Problem("winograd_convolution_weight", _winograd_convolution_weight),
}
"""The operators of vpfast.ops."""

if _native.extension is not None:
    for _name in ("sample_codes", "sample_frame"):
        PROBLEMS[_name] = Problem(_name, functools.partial(_sampler, _name))
    if _native.extension.isa() == "amx":
        PROBLEMS["tile_program"] = Problem("tile_program", _tile_program)

FUNCTIONS = {name: problem for name, problem in PROBLEMS.items() if not problem.writes}
IN_PLACE = {name: problem for name, problem in PROBLEMS.items() if problem.writes}
ONE_EACH = {problem.operator: problem for problem in reversed(FUNCTIONS.values())}
"""Operator -> the first of its problems, of those in FUNCTIONS."""

WITHOUT_TRITON = {
    *("plane_convolution", "plane_convolution_weight"),
    *("winograd_weights", "winograd_convolution", "winograd_convolution_weight"),
}
"""For CPUs alone."""
