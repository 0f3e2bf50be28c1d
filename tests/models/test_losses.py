"""Eqs. 7 and 9 of S-HR-VQVAE, each option written out, with values and gradients."""

import math
from typing import Any

import pytest
import torch
from spreading import spread
from torch import Tensor

from vpfast.models import SHRVQVAE, Codes, SHRVQVAEConfig
from vpfast.models.shrvqvae import joint_loss, joint_terms, prior_loss, sample
from vpfast.models.shrvqvae.loss import relaxed_latent

TINY: dict[str, Any] = {
    "in_channels": 1,
    "channels": (4, 6),
    "residual_channels": 3,
    "residual_blocks": 1,
    "latent_channels": 3,
    "codebook_size": 3,
    "layers": 3,
    "dead_codes": "ignore",
    "prior_channels": 6,
    "prior_blocks": 2,
    "prior_heads": 2,
    "prior_head_dim": 3,
    "prior_ffn": 5,
    "prior_head": 5,
}
CONTEXT = 2


def model(**changes: Any) -> SHRVQVAE:
    """In float64, with a latent and codewords of standard deviation near 1, so that all of them are in use."""
    torch.manual_seed(0)
    made = SHRVQVAE(SHRVQVAEConfig(**{**TINY, **changes})).double()
    spread(made, frames())
    return made


def frames() -> Tensor:
    return torch.rand(2, CONTEXT + 2, 1, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def logits_and_codes(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, 4, 2, 3, 3, 5, generator=generator, dtype=torch.float64).to(dtype)
    return logits, torch.randint(5, logits.shape[:-1], generator=generator)


def codeword(made: SHRVQVAE, layer: int, path: list[int]) -> Tensor:
    """The codeword of ``layer`` (from 0) at the end of ``path``, the local codes of layers 0 .. layer."""
    row = 0
    for code in path if made.config.strict_tree else path[-1:]:
        row = row * made.config.codebook_size + code
    return made.autoencoder.quantizer.codebooks[layer][row].detach()


def latent_written_out(made: SHRVQVAE, weights: Tensor, parents: Tensor) -> Tensor:
    """Sum over layers of the children of ``parents`` (P, n) times their ``weights`` (P, n, M): (P, D)."""
    rows = []
    for weight, parent in zip(weights, parents.tolist(), strict=True):
        parts = [
            weight[layer, code] * codeword(made, layer, [*parent[:layer], code])
            for layer in range(made.config.layers)
            for code in range(made.config.codebook_size)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


# --- Eq. 7 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", ["future", "all"])
@pytest.mark.parametrize("layers", ["mean", "sum"])
def test_equation_7_written_out(counted: str, layers: str) -> None:
    logits, codes = logits_and_codes()
    config = SHRVQVAEConfig(prior_loss_frames=counted, prior_loss_layers=layers)  # type: ignore[arg-type]
    first = 1 if counted == "future" else 0
    by_layer = []
    for layer in range(3):
        terms = [
            -math.log(math.exp(row[code]) / sum(map(math.exp, row)))
            for row, code in zip(
                logits[:, first:, :, :, layer].flatten(0, 3).tolist(),
                codes[:, first:, :, :, layer].flatten().tolist(),
                strict=True,
            )
        ]
        by_layer.append(sum(terms) / len(terms))
    expected = sum(by_layer) / (3 if layers == "mean" else 1)
    assert prior_loss(logits, codes, 1, config).item() == pytest.approx(expected, rel=1e-12)


def test_equation_7_sums_half_precision_in_single() -> None:
    logits, codes = logits_and_codes(torch.bfloat16)
    loss = prior_loss(logits, codes, 1, SHRVQVAEConfig())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), prior_loss(logits.double(), codes, 1, SHRVQVAEConfig()))


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (0, ValueError, "context must be 1 or more, got 0"),
        (4, ValueError, "must leave a frame to predict: 4 frames given as context of a clip of 4"),
        (1.5, TypeError, r"got 1\.5"),
    ],
)
def test_contexts_refused(context: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prior_loss(*logits_and_codes(), context, SHRVQVAEConfig())
    with pytest.raises(error, match=message):
        joint_loss(model(), frames(), context)


def test_logits_that_do_not_fit_the_codes_are_refused() -> None:
    logits, codes = logits_and_codes()
    with pytest.raises(ValueError, match=r"got \(2, 4, 2, 3, 3, 5\) and \(2, 4, 2, 3, 2\)"):
        prior_loss(logits, codes[..., :2], 1, SHRVQVAEConfig())


# --- the codes that gradients pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code_order", ["depth", "independent", "layers"])
@pytest.mark.parametrize("strict_tree", [True, False])
def test_straight_through_softmax_written_out(code_order: str, strict_tree: bool) -> None:
    made = model(code_order=code_order, strict_tree=strict_tree)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    given = torch.randint(3, (7, 3), generator=generator)
    upstream = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    chosen = logits.argmax(-1)
    parents = chosen if code_order == "independent" else given
    hard = torch.nn.functional.one_hot(chosen, 3).double()

    found = relaxed_latent(logits, given, made.autoencoder.quantizer, made.config)
    torch.testing.assert_close(found, latent_written_out(made, hard, parents))
    (gradient,) = torch.autograd.grad(found, logits, upstream)
    (expected,) = torch.autograd.grad(latent_written_out(made, logits.softmax(-1), parents), logits, upstream)
    torch.testing.assert_close(gradient, expected)


def test_gumbel_draws_codes_by_their_probability() -> None:
    made = model(joint_relaxation="gumbel", layers=1)
    quantizer = made.autoencoder.quantizer
    torch.manual_seed(0)
    row = torch.tensor([[0.5, -1.0, 1.0]], dtype=torch.float64)
    count = 20_000
    logits = row.expand(count, 1, 3).clone().requires_grad_()
    found = relaxed_latent(logits, torch.zeros(count, 1, dtype=torch.int64), quantizer, made.config)
    distance = (found[:, None] - quantizer.codebooks[0].detach()).norm(dim=-1)
    assert (distance.amin(1) < 1e-12).all()
    share = torch.bincount(distance.argmin(1), minlength=3) / count
    expected = row[0].softmax(0)
    assert ((share - expected).abs() < 4.5 * (expected * (1 - expected) / count).sqrt()).all()
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient.isfinite().all()
    assert not torch.equal(gradient[0], gradient[1])  # each of its own sample


# --- Eq. 9 ------------------------------------------------------------------------------------------------------------


def chosen_codes(made: SHRVQVAE, given: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the prior for ``given`` and the codes of the future that they choose."""
    logits = made.prior(given)
    return logits, logits[:, CONTEXT:].argmax(-1)


@pytest.mark.parametrize("inputs", ["teacher", "free"])
@pytest.mark.parametrize(("reduction", "scaling"), [("mean", "half"), ("sum", "half"), ("mean", "unit")])
def test_equation_9_written_out(inputs: str, reduction: str, scaling: str) -> None:
    made = model(joint_inputs=inputs, loss_reduction=reduction, scaling=scaling, joint_weight=0.3)
    codes = made.autoencoder.encode(frames()).indices
    given = codes
    if inputs == "free":
        given = torch.cat((codes[:, :CONTEXT], sample(made.prior, codes[:, :CONTEXT], 2)), 1)
        assert not torch.equal(given, codes)
    logits, chosen = chosen_codes(made, given)
    future = given[:, CONTEXT:]
    assert not torch.equal(chosen, codes[:, CONTEXT:])
    hard = torch.nn.functional.one_hot(chosen, 3).double().flatten(0, 3)
    latent = latent_written_out(made, hard, future.flatten(0, 3)).view(4, 2, 3, 3).movedim(-1, 1)
    gain = {"half": 1, "unit": 2}[scaling]
    difference = made.autoencoder.decoder(latent) - gain * (frames()[:, CONTEXT:].flatten(0, 1) - 0.5)
    squares = difference.square()
    reconstruction = squares.mean() if reduction == "mean" else squares.sum()
    prior = prior_loss(logits, codes, CONTEXT, made.config)

    terms = joint_terms(made, frames(), CONTEXT)
    torch.testing.assert_close(terms.prior, prior)
    torch.testing.assert_close(terms.reconstruction, reconstruction)
    torch.testing.assert_close(terms.total, prior + 0.3 * reconstruction)
    torch.testing.assert_close(joint_loss(made, frames(), CONTEXT), terms.total)


def test_running_free_the_frames_are_those_of_predict() -> None:
    made = model(joint_inputs="free")
    prediction = made(frames(), CONTEXT, generate=True).prediction
    torch.testing.assert_close(prediction.clamp(0, 1), made.predict(frames()[:, :CONTEXT], 2))


@pytest.mark.parametrize("trains", ["prior_and_decoder", "decoder"])
@pytest.mark.parametrize("inputs", ["teacher", "free"])
@pytest.mark.parametrize("relaxation", ["softmax", "gumbel"])
def test_what_gets_a_gradient(trains: str, inputs: str, relaxation: str) -> None:
    made = model(joint_trains=trains, joint_inputs=inputs, joint_relaxation=relaxation)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    joint_terms(made.train(), frames(), CONTEXT).total.backward()
    changed = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    expected = {
        name
        for name, _ in made.named_parameters()
        if name.startswith("autoencoder.decoder") or (trains == "prior_and_decoder" and name.startswith("prior."))
    }
    assert changed == expected
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_reconstruction_reaches_the_prior() -> None:
    made = model()
    joint_terms(made, frames(), CONTEXT).reconstruction.backward()
    for name in ("embed.0.weight", "stem.past", "heads.0.weight", "heads.2.weight"):
        gradient = made.prior.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_without_gradients_the_loss_is_the_same() -> None:
    made = model()
    loss = joint_loss(made, frames(), CONTEXT)
    with torch.no_grad():
        found = joint_loss(made, frames(), CONTEXT)
    assert not found.requires_grad
    torch.testing.assert_close(found, loss)


def test_joint_training_betters_both_terms() -> None:
    made = model().float()
    optimizer = torch.optim.Adam([*made.prior.parameters(), *made.autoencoder.decoder.parameters()], lr=3e-3)
    history = []
    for _ in range(40):
        terms = joint_terms(made, frames().float(), CONTEXT)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        history.append((terms.prior.item(), terms.reconstruction.item()))
    assert history[-1][0] < 0.8 * history[0][0]
    assert history[-1][1] < 0.9 * history[0][1]


def test_the_codes_of_the_model_are_those_of_its_autoencoder() -> None:
    made = model()
    output = made(frames(), CONTEXT)
    assert output.prediction is None
    codes: Codes = made.autoencoder.encode(frames())
    assert torch.equal(output.codes, codes.indices)
    torch.testing.assert_close(output.logits, made.prior(codes.indices))
