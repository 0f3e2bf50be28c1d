"""The operators of the compiled sampler, which :mod:`vpfast.models` alone calls: S-HR-VQVAE's codes of one frame.

They are defined down here, so that a program exported from a model runs where nothing but ``vpfast.ops`` is imported.
There is no reference beside them: that is the sampler in torch, ``vpfast.models.shrvqvae.sample`` under
``vpfast.backend("reference")``. The kernel is csrc/sample_codes.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from vpfast.ops._library import LIBRARY, refuse_vmap, register_fake

NOT_FINITE = "the prior gives logits that are not finite: its weights are not, or overflow in half precision"

LIBRARY.define(
    "sample_codes(Tensor(a!) codes, Tensor(b!)[] network, Tensor[] tables, Tensor keys, int[] grid, str[] masks,"
    " int[] windows, int[] sizes, float temperature, int top_k, int threads) -> bool"
)

# The same for a graph that is traced. What changes is told apart from the weights, which a trace would otherwise copy
# before every call; nothing comes back that Python would have to look at; and threads are those of the moment.
LIBRARY.define(
    "sample_frame(Tensor(a!) codes, Tensor(b!)[] kept, Tensor[] weights, int[] places, Tensor[] tables, Tensor keys,"
    " int[] grid, str[] masks, int[] windows, int[] sizes, float temperature, int top_k) -> ()"
)


def _sample_frame(
    codes: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    places: Sequence[int],
    tables: Sequence[Tensor],
    keys: Tensor,
    grid: Sequence[int],
    masks: Sequence[str],
    windows: Sequence[int],
    sizes: Sequence[int],
    temperature: float,
    top_k: int,
) -> None:
    """``network`` of ``sample_codes`` is ``weights`` with ``kept`` in between, at ``places`` in ascending order.

    Raises:
        ValueError: logits that are not finite.
    """
    network = list(weights)
    for place, tensor in zip(places, kept, strict=True):
        network.insert(place, tensor)
    threads = torch.get_num_threads()
    finite = torch.ops.vpfast.sample_codes(
        codes, network, tables, keys, grid, masks, windows, sizes, temperature, top_k, threads
    )
    if not finite:
        raise ValueError(NOT_FINITE)


def _no_trace(*arguments: Any) -> NoReturn:
    raise RuntimeError(
        "vpfast::sample_codes tells by what it returns whether all logits were finite, which a trace cannot know; "
        "vpfast::sample_frame is the same for a trace"
    )


LIBRARY.impl("sample_frame", _sample_frame, "CPU")
register_fake("sample_frame", lambda *arguments: None)
register_fake("sample_codes", _no_trace)
for _name in ("sample_codes", "sample_frame"):
    refuse_vmap(_name, "a batch of clips is one call: give predict or sample the whole batch")
