"""The encoder in one pass, on matrix tiles and by oneDNN: maps and codes of the modules, weights of the moment."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import vpfast
from vpfast.models import HRVQVAE, SHRVQVAEConfig
from vpfast.models.shrvqvae import fused, hrvqvae
from vpfast.models.shrvqvae.tiled import TiledEncoder
from vpfast.ops import _native

CONFIGS: dict[str, dict[str, Any]] = {
    "KTH": {},
    "Moving MNIST": {"in_channels": 1, "latent_channels": 4, "codebook_size": 4},
    "unit scaling, one width": {"channels": (24,), "scaling": "unit", "residual_blocks": 3},
    "no residual blocks": {"channels": (5, 7, 11), "residual_blocks": 0, "latent_channels": 3},
}


@pytest.fixture(autouse=True, params=[TiledEncoder, fused.OneDNNEncoder])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[fused.Engine]]:
    """Each engine in turn, for frames of any size."""
    kind: type[fused.Engine] = request.param
    extension = _native.extension
    monkeypatch.setattr(fused, "_LEAST_PIXELS", 0)
    if kind is TiledEncoder and (extension is None or extension.isa() != "amx"):
        pytest.skip("needs a processor with matrix tiles (AMX) and compiled kernels")
    if kind is fused.OneDNNEncoder and not fused._has_onednn():
        pytest.skip("needs oneDNN's fused convolutions")
    if kind is fused.OneDNNEncoder and extension is not None and extension.isa() == "amx":
        extension.select_isa("avx512")
    yield kind
    if extension is not None:
        extension.select_isa("auto")


def autoencoder(**changes: Any) -> HRVQVAE:
    """Codebooks on the scale of the latent, so that all layers are in use."""
    torch.manual_seed(0)
    model = HRVQVAE(SHRVQVAEConfig(**changes)).eval()
    with torch.no_grad():
        spread = model.encoder(frames(4, model.config.in_channels) - 0.5).std()
        for depth, codebook in enumerate(model.quantizer.codebooks):
            codebook.copy_(spread * 0.6**depth * torch.randn(codebook.shape))
    return model


def frames(count: int, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(count, channels, 32, 48, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_modules(model: HRVQVAE, x: Tensor) -> Tensor:
    return model.encoder(model._to_network(x))


@torch.no_grad()
def in_one_pass(model: HRVQVAE, x: Tensor) -> Tensor:
    engine = fused.engine_of(model.encoder, model.config, x)
    assert engine is not None
    return engine.latent(x, hrvqvae._GAIN[model.config.scaling])


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-6 * expected.abs().max())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("count", [1, 3])
def test_the_maps_of_the_modules(changes: dict[str, Any], count: int) -> None:
    model = autoencoder(**changes)
    x = frames(count, model.config.in_channels)
    before = x.clone()
    found = in_one_pass(model, x)
    assert near(found, by_modules(model, x))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    assert torch.equal(in_one_pass(model, x.transpose(2, 3).contiguous().transpose(2, 3)), found)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_the_codes_of_the_modules(changes: dict[str, Any]) -> None:
    """Where the two nearest codewords are further apart than rounding moves them."""
    model = autoencoder(**changes)
    x = frames(12, model.config.in_channels)
    with vpfast.backend("reference"):
        expected = model.indices(x)
    exact, books = by_modules(copy.deepcopy(model).double(), x.double()).movedim(1, -1), model.quantizer.codebooks
    residual, row, clear = exact.clone(), torch.zeros(exact.shape[:-1], dtype=torch.int64), None
    for layer, book in enumerate(books):
        of_row = book.double().unflatten(0, (-1, model.config.codebook_size))[row]
        nearest = (residual.unsqueeze(-2) - of_row).square().sum(-1).topk(2, -1, largest=False).values
        apart = nearest[..., 1] - nearest[..., 0] > 1e-5 * exact.square().sum(-1).max()
        clear = apart if clear is None else clear & apart
        row = row * model.config.codebook_size + expected[..., layer]
        residual = residual - book.double()[row]
    assert clear is not None
    assert clear.float().mean() > 0.95
    assert len(expected.unique()) > 1
    assert torch.equal(model.indices(x)[clear], expected[clear])


def test_frames_have_the_codes_that_they_have_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = autoencoder(), frames(9)
    together = model.indices(clip)
    assert torch.equal(torch.cat([model.indices(frame) for frame in clip.split(1)]), together)
    monkeypatch.setattr(hrvqvae, "_PIXELS_IN_CACHE", 2 * 32 * 48)
    assert torch.equal(model.indices(clip), together)


def loaded(model: HRVQVAE) -> None:
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()})


def trained(model: HRVQVAE) -> None:
    model.encoder(frames(1)).square().sum().backward()
    torch.optim.Adam(model.encoder.parameters(), lr=0.1).step()


def written_past_autograd(model: HRVQVAE) -> None:
    model.encoder[2].weight.data.mul_(2)


def written_through_numpy(model: HRVQVAE) -> None:
    model.encoder[0].weight.detach().numpy()[:] *= -1


def replaced(model: HRVQVAE) -> None:
    model.encoder[-1].weight = torch.nn.Parameter(model.encoder[-1].weight.detach() + 1)


@pytest.mark.parametrize("change", [loaded, trained, written_past_autograd, written_through_numpy, replaced])
def test_weights_are_those_of_the_moment(change: Callable[[HRVQVAE], None]) -> None:
    model, x = autoencoder(), frames(2)
    before = in_one_pass(model, x)
    change(model)
    after = in_one_pass(model, x)
    assert near(after, by_modules(model, x))
    assert not near(after, before)


def test_a_model_that_has_encoded_is_copied_and_stored_as_ever() -> None:
    model, x = autoencoder(), frames(2)
    names = list(model.state_dict())
    codes = model.indices(x)
    assert list(model.state_dict()) == names
    assert torch.equal(copy.deepcopy(model).indices(x), codes)
    assert torch.equal(pickle.loads(pickle.dumps(model)).indices(x), codes)


def test_threads_do_not_meet_in_the_engine_s_memory() -> None:
    model, clips = autoencoder(), [frames(3, seed=seed) for seed in range(4)]
    expected = [in_one_pass(model, x) for x in clips]
    found: dict[int, list[Tensor]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: [in_one_pass(model, clips[i]) for _ in range(20)]}))
        for i in range(len(clips))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made, expected[i]) for i in range(len(clips)) for made in found[i])


def test_where_it_does_not_serve_the_modules_do(engine: type[fused.Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = autoencoder(), frames(2)

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("fused")

    monkeypatch.setattr(engine, "latent", refuse)
    with pytest.raises(AssertionError, match="fused"):
        model.indices(x)
    for dtype in (torch.float64, torch.bfloat16):
        copy.deepcopy(model).to(dtype).indices(x.to(dtype))
    model.indices(x[:0])
    with vpfast.backend("reference"):
        model.indices(x)
    with torch.autocast("cpu", torch.bfloat16):
        model.indices(x)
    model.encoder[1].register_forward_hook(lambda module, given, made: None)
    model.indices(x)
    model.encoder[1]._forward_hooks.clear()
    monkeypatch.setattr(fused, "_LEAST_PIXELS", 2 * 32 * 48 + 1)
    model.indices(x)
    monkeypatch.setattr(fused, "_LEAST_PIXELS", 2 * 32 * 48)
    with pytest.raises(AssertionError, match="fused"):
        model.indices(x)
    if engine is fused.OneDNNEncoder:
        with torch.backends.mkldnn.flags(enabled=False):
            model.indices(x)
        monkeypatch.setattr(fused, "_OPERATORS", ("an_operator_that_is_not_there",))
        model.indices(x)


class Scaled(nn.Module):
    """A parametrization whose result hangs on a buffer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def parametrized(model: HRVQVAE) -> None:
    parametrize.register_parametrization(model.encoder[0], "weight", Scaled(-2.0))


def parametrized_and_changed(model: HRVQVAE) -> None:
    parametrize.register_parametrization(model.encoder[0], "weight", Scaled(1.0))
    model.indices(frames(2))
    model.encoder[0].parametrizations.weight[0].factor.fill_(-2.0)


def normed_and_trained(model: HRVQVAE) -> None:
    for layer in (model.encoder[2], model.encoder[-1]):
        parametrizations.spectral_norm(layer)
    model.eval().indices(frames(2))
    model.train()
    for _ in range(5):
        model.encoder(frames(2))
    model.eval()


def pruned_and_loaded(model: HRVQVAE) -> None:
    prune.l1_unstructured(model.encoder[0], "weight", 0.5)
    layers = ("weight_orig", "weight", "bias")
    state = model.state_dict()
    model.load_state_dict({name: -value if name.endswith(layers) else value for name, value in state.items()})


def patched(model: HRVQVAE) -> None:
    model.encoder[0].forward = lambda x, forward=model.encoder[0].forward: -forward(x)


def wrapped(model: HRVQVAE) -> None:
    model.encoder[-1] = nn.Sequential(model.encoder[-1], nn.Conv2d(3, 3, 1))


def activated_otherwise(model: HRVQVAE) -> None:
    model.encoder[1] = nn.GELU()


def without_a_block(model: HRVQVAE) -> None:
    model.encoder[5] = nn.Identity()


def padded_otherwise(model: HRVQVAE) -> None:
    model.encoder[0].padding_mode = "circular"


CHANGES = [parametrized, parametrized_and_changed, normed_and_trained, pruned_and_loaded, patched, wrapped]
CHANGES += [activated_otherwise, without_a_block, padded_otherwise]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("first", [False, True], ids=["at once", "after it has encoded"])
def test_other_layers_than_those_it_was_made_with_do_their_own_work(
    change: Callable[[HRVQVAE], None], first: bool
) -> None:
    model, x = autoencoder(latent_channels=3), frames(2)
    before = model.indices(x) if first else None
    change(model)
    found = model.indices(x)
    with vpfast.backend("reference"):
        assert torch.equal(found, model.indices(x))
    assert before is None or not torch.equal(found, before)


def test_a_compiled_encoder_encodes() -> None:
    model, x = autoencoder(), frames(2)
    expected = by_modules(model, x)
    model.encoder = torch.compile(model.encoder, backend="eager")
    assert torch.equal(by_modules(model, x), expected)
    assert model.indices(x).shape == (2, 8, 12, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("name", ["0.bias", "2.weight", "5.narrow.weight", "8.bias"])
def test_values_that_are_not_finite_are_told(value: float, name: str) -> None:
    """Those that a ReLU of oneDNN would make 0, too; a value that is large and no more is encoded as ever."""
    model = autoencoder()
    x = frames(1)
    model.indices(x)
    with torch.no_grad():
        model.encoder.get_parameter(name).view(-1)[0] = value
    if bool(by_modules(model, x).isfinite().all()):
        with vpfast.backend("reference"):
            expected = model.indices(x)
        assert torch.equal(model.indices(x), expected)
        return
    with pytest.raises(ValueError, match="the encoder gives values that are not finite"):
        model.indices(x)
