"""What every code of the ST-PixelCNN depends on: all that it should see, and nothing that it should not.

Small clips in float64, every conditioning set, attention and code order. What may be seen is written out here as
matrices over (place, layer): once as the rule of the conditioning set, once as what taps, masks and depth reach.
"""

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from vpfast.models import SHRVQVAEConfig, STPixelCNN
from vpfast.models.shrvqvae.config import Attention, CodeOrder, Conditioning

GRID = T, H, W = 3, 3, 5
FRAME, PLACES, LAYERS, CODEWORDS = H * W, T * H * W, 2, 3
BLOCKS = 2

AT = torch.cartesian_prod(*map(torch.arange, GRID))
OFFSET = AT[None] - AT[:, None]  # from row to column
"""(L, L, 3): how far column's place lies from row's, in t, y and x."""
PLACE = torch.arange(PLACES)
DT, DJ = OFFSET[..., 0], PLACE[None] % FRAME - PLACE[:, None] % FRAME
OWN = torch.eye(PLACES, dtype=torch.bool)
NEAR = (OFFSET[..., 1:].abs() <= 1).all(-1)

CASES = list(itertools.product(get_args(Conditioning), get_args(Attention), get_args(CodeOrder)))


def model(conditioning: str, attention: str, code_order: str, **changes: Any) -> STPixelCNN:
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "layers": LAYERS,
        "codebook_size": CODEWORDS,
        "prior_channels": 6,
        "prior_blocks": BLOCKS,
        "prior_attention_every": 1,
        "prior_heads": 3,
        "prior_head_dim": 2,
        "prior_ffn": 8,
        "prior_head": 8,
        "attention_window": (1, 1, 2),
        "conditioning": conditioning,
        "attention": attention,
        "code_order": code_order,
    }
    return STPixelCNN(SHRVQVAEConfig(**{**fields, **changes})).double()


def then(later: Tensor, sooner: Tensor) -> Tensor:
    """What is reached by ``later`` from what is reached by ``sooner``."""
    return (later.double() @ sooner.double()) > 0


def before(conditioning: str) -> Tensor:
    """(L, L): whose codes of its own layer a place may see."""
    return {"raster": (DT < 0) | ((DT == 0) & (DJ < 0)), "eq6": (DT < 0) & (DJ < 0), "past_frames": DT < 0}[
        conditioning
    ]


def attended(conditioning: str, attention: str) -> Tensor:
    """(L, L): whose features an attention looks at."""
    seen = (DT <= 0) & (DJ <= 0) if conditioning == "eq6" else (DT < 0) | ((DT == 0) & (DJ <= 0))
    if attention == "window":
        seen = seen & (OFFSET.abs() <= torch.tensor((1, 1, 2))).all(-1)
    if attention == "axial":
        seen = seen & ((OFFSET != 0).sum(-1) <= 1)
    return seen


def reached(conditioning: str, attention: str, code_order: str) -> Tensor:
    """(LAYERS, L, LAYERS, L): which codes reach the logits of (layer, place), by taps, masks and depth."""
    past = NEAR & (DT == -1) & (before("eq6") if conditioning == "eq6" else True)
    present = NEAR & (DT == 0) & (DJ < 0) & (conditioning == "raster")
    carried_past = (DT == -1) & (DJ == -1) if conditioning == "eq6" else PLACE[None] == PLACE[:, None] - 1
    carried_past = carried_past & (DT == -1) & (conditioning != "past_frames")
    carried_present = (DT == 0) & (DJ == -1) & (conditioning == "raster")
    step = NEAR & ((DT == -1) | (DT == 0))
    if conditioning == "eq6":
        step = step & (DJ <= 0)
    elif conditioning == "raster":
        step = step & ((DT < 0) | (DJ <= 0))
    result = torch.zeros(LAYERS, PLACES, LAYERS, PLACES, dtype=torch.bool)
    for layer, of in itertools.product(range(LAYERS), repeat=2):
        seen = past | carried_past
        if code_order != "layers" or of == layer:
            seen = seen | present | carried_present
        elif of < layer:
            seen = seen | (NEAR & (DT == 0))
        for _ in range(BLOCKS):
            seen = seen | then(step, seen)
            if attention != "none":
                seen = seen | then(attended(conditioning, attention), seen)
        if of < layer and code_order != "independent":
            seen = seen | OWN
        result[layer, :, of] = seen
    return result


def allowed(conditioning: str, code_order: str) -> Tensor:
    """(LAYERS, L, LAYERS, L): which codes the conditioning set and the code order let (layer, place) see at most."""
    result = before(conditioning).expand(LAYERS, LAYERS, PLACES, PLACES).transpose(1, 2).clone()
    for layer, of in itertools.product(range(LAYERS), repeat=2):
        if code_order == "layers" and of < layer:
            result[layer, :, of] = DT <= 0  # frames and layers come before positions, so this is all in the past
        elif code_order == "layers" and of > layer:
            result[layer, :, of] &= DT < 0
        elif code_order == "depth" and of < layer:
            result[layer, :, of] |= OWN
    return result


def gradients(prior: STPixelCNN, codes: Tensor) -> Tensor:
    """(LAYERS, L, LAYERS, L): whether the embedding of a code has a gradient from the logits of (layer, place).

    Clip b of the batch is asked about place b alone, so that one backward pass serves all places.
    """
    made: dict[int, list[Tensor]] = {layer: [] for layer in range(LAYERS)}

    def keep(layer: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            output.retain_grad()
            made[layer].append(output)

        return hook

    for embeddings in (prior.embed, prior.parents):
        for layer, embedding in enumerate(embeddings):
            embedding.register_forward_hook(keep(layer))
    result = torch.zeros(LAYERS, PLACES, LAYERS, PLACES, dtype=torch.bool)
    for layer in range(LAYERS):
        for outputs in made.values():
            outputs.clear()
        logits = prior(codes.expand(PLACES, *GRID, LAYERS)).flatten(1, 3)[PLACE, PLACE, layer]
        (logits * torch.randn_like(logits)).sum().backward()
        for of, outputs in made.items():
            assert outputs
            for output in outputs:
                if output.grad is not None:
                    result[layer, :, of] |= (output.grad != 0).any(-1).flatten(1)
    return result


def some_codes() -> Tensor:
    return torch.randint(CODEWORDS, (1, *GRID, LAYERS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("conditioning", "attention", "code_order"), CASES)
def test_gradients_lead_exactly_where_they_should(conditioning: str, attention: str, code_order: str) -> None:
    found = gradients(model(conditioning, attention, code_order), some_codes())
    assert not (found & ~allowed(conditioning, code_order)).any()
    assert torch.equal(found, reached(conditioning, attention, code_order))


@pytest.mark.parametrize(("conditioning", "attention", "code_order"), CASES)
def test_a_changed_code_changes_only_what_sees_it(conditioning: str, attention: str, code_order: str) -> None:
    """Every code changed alone, end to end; what changes at all is what the gradients' matrix says."""
    prior, codes = model(conditioning, attention, code_order), some_codes()
    changed = codes.repeat(PLACES * LAYERS, 1, 1, 1, 1).flatten(1, 3)
    which = torch.arange(PLACES * LAYERS)
    changed[which, which % PLACES, which // PLACES] += 1
    changed = (changed % CODEWORDS).unflatten(1, GRID)
    with torch.no_grad():
        difference = (prior(changed) - prior(codes)).abs().amax(-1).flatten(1, 3)
    difference = difference.unflatten(0, (LAYERS, PLACES)).permute(3, 2, 0, 1)
    sees = reached(conditioning, attention, code_order)
    assert difference[~sees].max() < 1e-13
    assert difference[sees].min() > 1e-11


@pytest.mark.parametrize("code_order", ["depth", "independent"])
@pytest.mark.parametrize("conditioning", get_args(Conditioning))
def test_full_attention_sees_all_that_is_allowed(conditioning: str, code_order: str) -> None:
    """With ``past_frames`` because the convolutions reach over the whole of these small frames."""
    assert torch.equal(reached(conditioning, "full", code_order), allowed(conditioning, code_order))


def test_what_full_attention_sees_layer_after_layer() -> None:
    """All of its own layer. Of the other layers, all that is two frames old or stands no later in its frame."""
    seen = reached("raster", "full", "layers")
    for layer, of in ((0, 1), (1, 0)):
        assert torch.equal(seen[layer, :, layer], before("raster"))
        assert seen[layer, :, of][(DT <= -2) | ((DT == -1) & (DJ <= 0))].all()
    assert seen[1, :, 0][(DT == 0) & (DJ <= 0)].all()
