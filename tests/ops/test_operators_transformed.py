"""The functions of vpfast.ops under vmap, derivatives of torch.func, torch.compile, torch.export, and all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from vpfast.ops import (
    Mask3d,
    _native,
    codeword_search,
    codeword_search_train,
    edlstm_gates,
    masked_attention3d,
    masked_attention3d_decode,
)

native = pytest.mark.skipif(_native.extension is None, reason="needs the compiled extension")

GRID, MASK, POSITIONS = (2, 3, 5), Mask3d("eq6", (1, None, 2)), torch.tensor([29, 3, 3, 17])


@dataclass(frozen=True)
class Function:
    """A function of vpfast.ops as one of ``tensors`` alone, which has one result."""

    call: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    batched: tuple[int, ...]  # in dim 0 of these lies a batch
    differentiable_in: tuple[int, ...]

    def tensors(self, seed: int = 0, batch: int | None = None) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [
            (batch, *shape[1:]) if batch is not None and k in self.batched else shape
            for k, shape in enumerate(self.shapes)
        ]
        return [torch.randn(shape, generator=generator) for shape in shapes]


def losses(z, *codebooks):
    found = codeword_search_train(z, list(codebooks), attached=True)
    each = found.codebook_losses + 0.25 * found.commitment_losses + 0.5 * found.combined_loss
    return torch.cat([found.quantized.sum(0), each])


FUNCTIONS = {
    "edlstm_gates": Function(
        lambda gates, c_prev: torch.cat(edlstm_gates(gates, c_prev), 1),
        ((5, 8, 3, 4), (5, 2, 3, 4)),
        batched=(0, 1),
        differentiable_in=(0, 1),
    ),
    "codeword_search": Function(
        lambda z, *codebooks: codeword_search(z, codebooks)[0],
        ((12, 4), (3, 4), (9, 4)),
        batched=(0,),
        differentiable_in=(1, 2),
    ),
    "codeword_search_losses": Function(
        losses,
        ((12, 4), (3, 4), (9, 4)),
        batched=(0,),
        differentiable_in=(0, 1, 2),
    ),
    "masked_attention3d": Function(
        lambda q, k, v: masked_attention3d(q, k, v, GRID, MASK),
        ((5, 2, 30, 8),) * 3,
        batched=(0, 1, 2),
        differentiable_in=(0, 1, 2),
    ),
    "masked_attention3d_decode": Function(
        lambda q, k, v: masked_attention3d_decode(q, k, v, GRID, POSITIONS, MASK),
        ((5, 2, 4, 8), (5, 2, 30, 8), (5, 2, 30, 8)),
        batched=(0, 1, 2),
        differentiable_in=(),
    ),
}
DIFFERENTIABLE = {name: function for name, function in FUNCTIONS.items() if function.differentiable_in}
ONE_KERNEL = ("edlstm_gates", "codeword_search", "masked_attention3d", "masked_attention3d_decode")


def stacked(function, count=3):
    """Several sets of tensors, and those that lie in a batch stacked, with vmap's dims."""
    sets = [function.tensors(seed) for seed in range(count)]
    each = [[one[k] if k in function.batched else sets[0][k] for k in range(len(one))] for one in sets]
    whole = [
        torch.stack([one[k] for one in sets]) if k in function.batched else sets[0][k] for k in range(len(sets[0]))
    ]
    return each, whole, tuple(0 if k in function.batched else None for k in range(len(whole)))


def weights_like(t):
    return torch.rand(t.shape, generator=torch.Generator().manual_seed(9))


def gradients(function, call, tensors):
    """Of a weighted sum of what ``call`` returns, in what the function is differentiable in."""
    leaves = [t.detach().clone().requires_grad_(k in function.differentiable_in) for k, t in enumerate(tensors)]
    result = call(*leaves)
    wanted = [leaves[k] for k in function.differentiable_in]
    return torch.autograd.grad((weights_like(result) * result).sum(), wanted)


def of_the_sum(function, argument):
    """The derivative of the sum of the result in one argument, by ``torch.func.grad``."""
    return torch.func.grad(lambda *tensors: function.call(*tensors).square().sum(), argument)


class Listening(TorchDispatchMode):
    """Which operators of vpfast are called."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vpfast":
            self.heard.append(func._opname)
        return func(*args, **(kwargs or {}))


def compiled(call, **options):
    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager", **options)


# --- vmap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_and_its_gradients_are_those_of_a_loop(name):
    function = FUNCTIONS[name]
    each, whole, dims = stacked(function)
    mapped = torch.func.vmap(function.call, dims)

    def loop(*tensors):
        slices = [[t[k] if d == 0 else t for t, d in zip(tensors, dims, strict=True)] for k in range(3)]
        return torch.stack([function.call(*one) for one in slices])

    assert torch.equal(mapped(*whole), torch.stack([function.call(*one) for one in each]))
    if function.differentiable_in:
        torch.testing.assert_close(gradients(function, mapped, whole), gradients(function, loop, whole))


@native
@pytest.mark.parametrize("name", ONE_KERNEL)
def test_vmap_is_one_call_of_the_kernel(name):
    _, whole, dims = stacked(FUNCTIONS[name])
    with Listening() as listening:
        torch.func.vmap(FUNCTIONS[name].call, dims)(*whole)
    assert listening.heard == [name]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_within_vmap(name):
    function = FUNCTIONS[name]
    _, whole, dims = stacked(function, 6)
    nested = [t.unflatten(0, (2, 3)) if d == 0 else t for t, d in zip(whole, dims, strict=True)]
    twice = torch.func.vmap(torch.func.vmap(function.call, dims), dims)
    assert torch.equal(twice(*nested).flatten(0, 1), torch.func.vmap(function.call, dims)(*whole))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_each_of_a_batch(name):
    """vmap of torch.func.grad, and of the backward pass."""
    function = DIFFERENTIABLE[name]
    each, whole, dims = stacked(function)
    k = function.differentiable_in[-1]
    found = torch.func.vmap(of_the_sum(function, k), dims)(*whole)
    torch.testing.assert_close(found, torch.stack([of_the_sum(function, k)(*one) for one in each]))

    leaves = [t.clone().requires_grad_(k in function.differentiable_in) for k, t in enumerate(each[0])]
    result, wanted = function.call(*leaves), [leaves[k] for k in function.differentiable_in]
    grads = torch.randn(4, *result.shape)

    def backward(grad):
        return torch.autograd.grad(result, wanted, grad, retain_graph=True)

    found, alone = torch.func.vmap(backward)(grads), [backward(grad) for grad in grads]
    torch.testing.assert_close(found, tuple(torch.stack(one) for one in zip(*alone, strict=True)))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_batch_of_gradients_is_right_or_one_error(name):
    """torch.autograd.grad(is_grads_batched=True), which takes another way through PyTorch than torch.func.vmap."""
    function = DIFFERENTIABLE[name]
    leaves = [t.requires_grad_(k in function.differentiable_in) for k, t in enumerate(function.tensors())]
    result, wanted = function.call(*leaves), [leaves[k] for k in function.differentiable_in]
    grads = torch.randn(4, *result.shape)
    if "codeword" in name:
        with pytest.raises(RuntimeError, match=r"^vpfast.ops.codeword_search .* torch.func.vmap$"):
            torch.autograd.grad(result, wanted, grads, is_grads_batched=True)
        return
    found = torch.autograd.grad(result, wanted, grads, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(result, wanted, grad, retain_graph=True) for grad in grads]
    torch.testing.assert_close(found, tuple(torch.stack(one) for one in zip(*alone, strict=True)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_under_autocast(name):
    function = FUNCTIONS[name]
    each, whole, dims = stacked(function)
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.stack([function.call(*one) for one in each])
        found = torch.func.vmap(function.call, dims)(*whole)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_within_autocast_are_those_after_it(name):
    function = DIFFERENTIABLE[name]
    with torch.autocast("cpu", torch.bfloat16):
        leaves = [t.requires_grad_(k in function.differentiable_in) for k, t in enumerate(function.tensors())]
        result, wanted = function.call(*leaves), [leaves[k] for k in function.differentiable_in]
        within = torch.autograd.grad(result, wanted, weights_like(result).to(result.dtype), retain_graph=True)
    after = torch.autograd.grad(result, wanted, weights_like(result).to(result.dtype))
    assert all(map(torch.equal, within, after))


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_once_for_batches_of_any_size(name):
    function = FUNCTIONS[name]
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = torch.compile(function.call, fullgraph=True, dynamic=True, backend=counter)
    for batch in (5, 7, 64):
        tensors = function.tensors(batch=batch)
        torch.testing.assert_close(call(*tensors), function.call(*tensors))
        if function.differentiable_in:
            expected = gradients(function, function.call, tensors)
            torch.testing.assert_close(gradients(function, call, tensors), expected)
    assert counter.frame_count == 1 + bool(function.differentiable_in)  # without gradients, and with


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_compiled(name):
    function = FUNCTIONS[name]
    _, whole, dims = stacked(function)
    mapped = torch.func.vmap(function.call, dims)
    torch.testing.assert_close(compiled(lambda *t: torch.func.vmap(function.call, dims)(*t))(*whole), mapped(*whole))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_derivatives_compiled(name):
    """Backward, for each of a batch, and forward: the compiler sees no tensor that says so."""
    function = DIFFERENTIABLE[name]
    _, whole, dims = stacked(function)
    tensors, tangents = tuple(function.tensors()), tuple(function.tensors(1))
    backward = of_the_sum(function, function.differentiable_in[-1])

    def forward(*tensors):
        return torch.func.jvp(function.call, tensors, tangents)[1]

    for derivative, given in ((backward, tensors), (torch.func.vmap(backward, dims), whole), (forward, tensors)):
        found = compiled(lambda *t, d=derivative: d(*t))(*given)
        torch.testing.assert_close(found, derivative(*given))
        assert found.count_nonzero()


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_export_for_batches_of_any_size(name, tmp_path):
    function = FUNCTIONS[name]

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function.call(*tensors)

    batch = torch.export.Dim("batch", max=4096)
    sizes = (tuple({0: batch} if k in function.batched else None for k in range(len(function.shapes))),)
    tensors = tuple(function.tensors())
    program = torch.export.export(Module(), tensors, dynamic_shapes=sizes)
    torch.export.save(program, tmp_path / "function.pt2")
    loaded = torch.export.load(tmp_path / "function.pt2")
    called = [node.target for node in loaded.graph.nodes if "vpfast" in str(node.target)]
    if _native.extension is not None or not name.startswith("edlstm"):
        assert called == [getattr(torch.ops.vpfast, name).default]
    for size in (1, 5, 40):
        tensors = function.tensors(batch=size)
        assert torch.equal(loaded.module()(*tensors), function.call(*tensors))
