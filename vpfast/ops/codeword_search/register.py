"""``vpfast::codeword_search`` and its training forms as torch operators: schema, fake, autograd, autocast, vmap."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from vpfast.ops._backend import Backends, native_devices
from vpfast.ops._library import LIBRARY, VARIANTS, register_fake, register_vmap, serve_by_triton
from vpfast.ops.codeword_search import reference
from vpfast.ops.codeword_search.reference import working_dtype

FORWARD, BACKWARD = "codeword_search", "codeword_search_backward"
TRAIN, TRAIN_BACKWARD = "codeword_search_train", "codeword_search_train_backward"
LOSSES = "codeword_search_losses"

for _variant in VARIANTS:
    LIBRARY.define(
        f"{FORWARD}{_variant}(Tensor z, Tensor[] codebooks, bool strict_tree) -> (Tensor quantized, Tensor indices)"
    )
    LIBRARY.define(
        f"{BACKWARD}{_variant}(Tensor grad_quantized, Tensor indices, Tensor[] codebooks, bool strict_tree) -> Tensor[]"
    )
    LIBRARY.define(
        f"{TRAIN}{_variant}(Tensor z, Tensor[] codebooks, bool strict_tree)"
        " -> (Tensor quantized, Tensor indices, Tensor errors, Tensor counts, Tensor sums)"
    )
    LIBRARY.define(
        f"{TRAIN_BACKWARD}{_variant}(Tensor? grad_quantized, Tensor weights_z, Tensor weights_codebooks, Tensor z,"
        " Tensor indices, Tensor[] codebooks, Tensor counts, Tensor sums, bool strict_tree)"
        " -> (Tensor grad_z, Tensor[] grad_codebooks)"
    )
    LIBRARY.define(
        f"{LOSSES}{_variant}(Tensor z, Tensor[] codebooks, bool strict_tree, bool attached)"
        " -> (Tensor quantized, Tensor indices, Tensor codebook_losses, Tensor commitment_losses, Tensor combined_loss,"
        " Tensor counts, Tensor sums)"
    )

Training = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Losses = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

backends = Backends("ops.codeword_search", native=native_devices(f"vpfast::{FORWARD}"), triton=True)


# --- the reference in the kernel's place ------------------------------------------------------------------------------


def _step(codebooks: Sequence[Tensor]) -> int:
    """How many vectors to take at a time: 2^20 distances' terms, and few enough that a sum runs in one thread."""
    return max(1, min(2**14, 2**20 // (len(codebooks[0]) * codebooks[0].shape[1] or 1)))


def _serve_reference_on_cpu() -> None:
    """Without compiled kernels the operators still exist. The reference answers for CPU tensors: in float64, as the
    kernels decide near-ties in it, and for some vectors at a time, so that memory stays bounded."""

    def search(z: Tensor, codebooks: list[Tensor], strict_tree: bool) -> tuple[Tensor, Tensor]:
        exact = [codebook.double() for codebook in codebooks]
        parts = [reference.codeword_search(part.double(), exact, strict_tree)[1] for part in z.split(_step(codebooks))]
        indices = torch.cat(parts)
        codewords = reference.chosen_codewords(indices, codebooks, strict_tree, working_dtype(z))
        return reference.finish(sum(codewords[1:], codewords[0]), z), indices

    def search_backward(
        grad_quantized: Tensor, indices: Tensor, codebooks: list[Tensor], strict_tree: bool
    ) -> list[Tensor]:
        gradients = reference.codeword_search_backward(grad_quantized.double(), indices, codebooks, strict_tree)
        return [gradient.contiguous() for gradient in gradients]

    def train(z: Tensor, codebooks: list[Tensor], strict_tree: bool) -> Training:
        quantized, indices = search(z, codebooks, strict_tree)
        exact = [codebook.double() for codebook in codebooks]
        steps = zip(z.split(_step(codebooks)), indices.split(_step(codebooks)), strict=True)
        parts = [reference.statistics(part.double(), codes, exact, strict_tree) for part, codes in steps]
        errors, counts, sums = (sum(some).to(working_dtype(z)) for some in zip(*parts, strict=True))
        return quantized, indices, errors, counts, sums

    def train_backward(
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
        exact = [codebook.double() for codebook in codebooks]
        weights = weights_z.double(), weights_codebooks.double()
        grad_z, grad_codebooks = reference.codeword_search_train_backward(
            grad_quantized, *weights, z.double(), indices, exact, counts, sums, strict_tree
        )
        pairs = zip(grad_codebooks, codebooks, strict=True)
        return grad_z.to(z.dtype).contiguous(), [grad.to(codebook.dtype).contiguous() for grad, codebook in pairs]

    LIBRARY.impl(FORWARD, search, "CPU")
    LIBRARY.impl(BACKWARD, search_backward, "CPU")
    LIBRARY.impl(TRAIN, train, "CPU")
    LIBRARY.impl(TRAIN_BACKWARD, train_backward, "CPU")


if "cpu" not in backends.native:
    _serve_reference_on_cpu()

serve_by_triton("codeword_search", FORWARD, BACKWARD, TRAIN, TRAIN_BACKWARD)


# --- fake tensors -----------------------------------------------------------------------------------------------------


def _fake_search(z: Tensor, codebooks: list[Tensor], strict_tree: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), z.new_empty((z.shape[0], len(codebooks)), dtype=torch.int64)


def _fake_search_backward(
    grad_quantized: Tensor, indices: Tensor, codebooks: list[Tensor], strict_tree: bool
) -> list[Tensor]:
    return [codebook.new_empty(codebook.shape) for codebook in codebooks]


def _fake_train(z: Tensor, codebooks: list[Tensor], strict_tree: bool) -> Training:
    rows = sum(codebook.shape[0] for codebook in codebooks)
    shapes = ((len(codebooks),), (rows,), (rows, z.shape[1]))
    errors, counts, sums = (z.new_empty(shape, dtype=working_dtype(z)) for shape in shapes)
    return *_fake_search(z, codebooks, strict_tree), errors, counts, sums


def _fake_train_backward(
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
    return z.new_empty(z.shape), [codebook.new_empty(codebook.shape) for codebook in codebooks]


# --- the losses of the training form ----------------------------------------------------------------------------------


def _losses(variant: str) -> Callable[[Tensor, list[Tensor], bool, bool], Losses]:
    """The errors of one search told as the three kinds of loss: equal in value, apart in what they are for."""
    train = getattr(torch.ops.vpfast, TRAIN + variant)

    def losses(z: Tensor, codebooks: list[Tensor], strict_tree: bool, attached: bool) -> Losses:
        quantized, indices, errors, counts, sums = train(z, codebooks, strict_tree)
        return quantized, indices, errors, errors.clone(), errors[-1].clone(), counts, sums

    return losses


def _weights(
    layers: int,
    attached: bool,
    like: Tensor,
    grad_codebook: Tensor | None,
    grad_commitment: Tensor | None,
    grad_combined: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """How much of each residual xi^i (columns) goes into the gradient of z (n,) and of each layer's codebook (n, n)."""
    to_z, to_codebooks = like.new_zeros(layers), like.new_zeros(layers, layers)
    if grad_codebook is not None:
        to_codebooks = to_codebooks - 2 * torch.diag(grad_codebook)  # d |xi^(i-1) - e^i|^2 / d e^i = -2 xi^i
    if grad_commitment is not None:
        to_z = 2 * grad_commitment
        if attached:  # xi^(i-1) = z - e^1 - ... - e^(i-1)
            to_codebooks = to_codebooks - 2 * grad_commitment.expand(layers, layers).triu(1)
    if grad_combined is not None:
        last = torch.nn.functional.pad(grad_combined.expand(layers, 1), (layers - 1, 0))
        to_codebooks = to_codebooks - 2 * last  # d |z - e_C|^2 / d e^j = -2 xi^n
    return to_z, to_codebooks


def _losses_setup(ctx: Any, inputs: tuple[Tensor, list[Tensor], bool, bool], output: Losses) -> None:
    z, codebooks, ctx.strict_tree, ctx.attached = inputs
    _, indices, _, _, _, counts, sums = output
    ctx.mark_non_differentiable(indices, counts, sums)
    ctx.save_for_backward(z, indices, counts, sums, *codebooks)
    ctx.set_materialize_grads(False)


Gradients = tuple[Tensor | None, Sequence[Tensor | None], None, None]


def _losses_backward(variant: str) -> Callable[..., Gradients]:
    train_backward = getattr(torch.ops.vpfast, TRAIN_BACKWARD + variant)

    def backward(
        ctx: Any,
        grad_quantized: Tensor | None,
        grad_indices: None,
        grad_codebook: Tensor | None,
        grad_commitment: Tensor | None,
        grad_combined: Tensor | None,
        grad_counts: None,
        grad_sums: None,
    ) -> Gradients:
        z, indices, counts, sums, *codebooks = ctx.saved_tensors
        if grad_codebook is None and grad_commitment is None and grad_combined is None:
            return grad_quantized, [None] * len(codebooks), None, None
        weights = _weights(len(codebooks), ctx.attached, counts, grad_codebook, grad_commitment, grad_combined)
        grad_z, grad_codebooks = train_backward(
            grad_quantized, *weights, z, indices, codebooks, counts, sums, ctx.strict_tree
        )
        return grad_z, grad_codebooks, None, None

    return backward


# --- gradients --------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Tensor, list[Tensor], bool], output: tuple[Tensor, Tensor]) -> None:
    _, codebooks, ctx.strict_tree = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *codebooks)
    ctx.set_materialize_grads(False)


def _backward(variant: str) -> Callable[..., tuple[None, Sequence[Tensor | None], None]]:
    """The codes are piecewise constant in z, so nothing reaches it."""
    search_backward = getattr(torch.ops.vpfast, BACKWARD + variant)

    def backward(
        ctx: Any, grad_quantized: Tensor | None, grad_indices: None
    ) -> tuple[None, Sequence[Tensor | None], None]:
        indices, *codebooks = ctx.saved_tensors
        if grad_quantized is None or not any(ctx.needs_input_grad[1]):
            return None, [None] * len(codebooks), None
        return None, search_backward(grad_quantized, indices, codebooks, ctx.strict_tree), None

    return backward


def _double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "vpfast.ops.codeword_search is differentiable once; a second derivative was asked for. "
        'Use vpfast.backend("reference"), whose gradients PyTorch can differentiate again.'
    )


def _no_batch_of_gradients(*arguments: Any) -> NoReturn:
    raise RuntimeError(
        "vpfast.ops.codeword_search has no backward pass for is_grads_batched=True or vectorize=True; take one "
        "gradient after another, or map torch.autograd.grad by torch.func.vmap"
    )


def _no_gradient(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "vpfast::codeword_search_train has no gradient of its own; call vpfast.ops.codeword_search_train, which has"
    )


# --- autocast ---------------------------------------------------------------------------------------------------------


def to_float32(tensor: Tensor) -> Tensor:
    """What autocast does to the vectors and codebooks: the search stays in float32, or in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _register_autocast(op: str, key: str) -> None:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    call = getattr(torch.ops.vpfast, op)

    def forward(z: Tensor, codebooks: list[Tensor], *options: bool) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return call(to_float32(z), [to_float32(codebook) for codebook in codebooks], *options)

    LIBRARY.impl(op, forward, key)


# --- both variants ----------------------------------------------------------------------------------------------------


def _register(variant: str) -> None:
    losses = _losses(variant)
    fakes: dict[str, Callable[..., Any]] = {
        FORWARD: _fake_search,
        BACKWARD: _fake_search_backward,
        TRAIN: _fake_train,
        TRAIN_BACKWARD: _fake_train_backward,
        LOSSES: losses,
    }
    for op, fake in fakes.items():
        register_fake(op + variant, fake)
        register_vmap(op + variant, ("z",) if op == FORWARD else ())  # the others sum over all vectors
    LIBRARY.impl(LOSSES + variant, losses, "CompositeExplicitAutograd")

    def differentiate(op: str, backward: Callable[..., Any], setup: Callable[..., None] | None = None) -> None:
        torch.library.register_autograd(f"vpfast::{op}{variant}", backward, setup_context=setup, lib=LIBRARY)

    differentiate(FORWARD, _backward(variant), _setup)
    differentiate(LOSSES, _losses_backward(variant), _losses_setup)
    differentiate(TRAIN, _no_gradient)
    for op in (BACKWARD, TRAIN_BACKWARD):
        differentiate(op, _double_backward)
        LIBRARY.impl(op + variant, _no_batch_of_gradients, "Batched")

    for op in (FORWARD, TRAIN, LOSSES):
        for key in ("AutocastCPU", "AutocastCUDA"):
            _register_autocast(op + variant, key)


for _variant in VARIANTS:
    _register(_variant)
