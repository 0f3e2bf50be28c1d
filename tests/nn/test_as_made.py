"""Modules that others look at, stand in for, or made weights of: each counts, and copies are free of it."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

from vpfast.nn import ConvLSTMCell, EDLSTMCell, EncLSTMDecCell
from vpfast.nn._as_made import (
    check_as_made,
    check_without_hooks,
    is_as_made,
    is_intercepted,
    plain_copy,
    renew_weights,
)
from vpfast.nn.bottleneck import Bottleneck
from vpfast.nn.convolution import Conv2d

everywhere = nn.modules.module


def maps(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)


def patched(part: nn.Module) -> None:
    part.forward = lambda x: torch.zeros_like(x)  # type: ignore[method-assign]


WATCHED: dict[str, Callable[[nn.Module], object]] = {
    "forward hook": lambda part: part.register_forward_hook(lambda *given: None),
    "forward pre-hook": lambda part: part.register_forward_pre_hook(lambda *given: None),
    "full backward hook": lambda part: part.register_full_backward_hook(lambda *given: None),
    "full backward pre-hook": lambda part: part.register_full_backward_pre_hook(lambda *given: None),
    "forward of its own": patched,
}


@pytest.mark.parametrize("watch", WATCHED.values(), ids=WATCHED)
def test_whoever_looks_at_a_part_is_seen(watch: Callable[[nn.Module], object]) -> None:
    block = Bottleneck(2, 3)
    assert not is_intercepted(block)
    watch(block.body[2])
    assert is_intercepted(block)
    assert not is_intercepted(block.skip)


@pytest.mark.parametrize(
    "register",
    [
        everywhere.register_module_forward_hook,
        everywhere.register_module_forward_pre_hook,
        everywhere.register_module_full_backward_hook,
        everywhere.register_module_full_backward_pre_hook,
    ],
)
def test_whoever_looks_at_all_modules_is_seen(register: Callable[..., torch.utils.hooks.RemovableHandle]) -> None:
    handle = register(lambda *given: None)
    assert is_intercepted(nn.ReLU())
    handle.remove()
    assert not is_intercepted(nn.ReLU())


# --- networks that others look at -------------------------------------------------------------------------------------


def networks() -> list[nn.Module]:
    return [
        Bottleneck(3, 3),
        Bottleneck(3, 3, batch_norm=True),
        Bottleneck(16, 16).to(memory_format=torch.channels_last),
        EDLSTMCell(3, 4, (6, 8), shared_channels=2),
        EncLSTMDecCell(3, 4, (6, 8)),
    ]


def run(network: nn.Module, x: Tensor) -> Tensor:
    if isinstance(network, EDLSTMCell):
        return network(x, None, maps(len(x), 2, x.shape[2] // 2, x.shape[3] // 2))[0]  # type: ignore[no-any-return]
    found = network(x)
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def given(network: nn.Module) -> Tensor:
    weight = next(network.parameters())
    if isinstance(network, Bottleneck):
        return maps(2, weight.shape[1], 8, 8, layout=torch.channels_last)
    return maps(2, 3, 8, 8)


@pytest.mark.parametrize("network", networks())
def test_full_backward_hooks_see_gradients_and_change_none(network: nn.Module) -> None:
    x, seen = given(network), []
    run(network, x).square().sum().backward()
    expected = [parameter.grad for parameter in network.parameters()]
    network.zero_grad()
    for part in network.modules():
        part.register_full_backward_hook(lambda part, *gradients: seen.append(part))
    run(network, x.requires_grad_()).square().sum().backward()
    for parameter, gradient in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(part in seen for part in network.modules() if isinstance(part, (nn.Conv2d, nn.LeakyReLU)))


@pytest.mark.parametrize("network", networks())
@pytest.mark.parametrize("with_gradients", [False, True])
def test_what_a_hook_keeps_stays_as_it_was(network: nn.Module, with_gradients: bool) -> None:
    kept: list[tuple[Tensor, Tensor]] = []
    for part in network.modules():
        if isinstance(part, (nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU)):
            part.register_forward_hook(lambda part, given, made: kept.append((made, made.detach().clone())))
    with torch.set_grad_enabled(with_gradients):
        run(network, given(network))
    assert kept
    assert all(torch.equal(made, then) for made, then in kept)


def test_a_layer_that_gives_its_input_back_does_not_have_it_changed() -> None:
    for index in range(3):
        block, x = Bottleneck(3, 3), given(Bottleneck(3, 3))
        block.body[index] = nn.Identity()
        before = x.clone()
        with torch.no_grad():
            block(x)
        assert torch.equal(x, before)
    block.body = nn.Identity()
    torch.testing.assert_close(block(x), nn.functional.leaky_relu(x + block.skip(x), 0.01))
    assert torch.equal(x, before)


@pytest.mark.parametrize("network", networks()[:3])
@pytest.mark.parametrize("index", [0, -1])
def test_a_forward_of_its_own_is_called_with_and_without_gradients(network: nn.Module, index: int) -> None:
    x, plain = given(network), copy.deepcopy(network)
    assert isinstance(network, Bottleneck)
    patched(network.body[index])
    found = network(x)
    assert not torch.allclose(found, plain(x))
    with torch.no_grad():
        torch.testing.assert_close(network(x), found)


def test_a_parametrization_is_computed_once_a_call() -> None:
    class Counted(nn.Module):
        count = 0

        def forward(self, weight: Tensor) -> Tensor:
            Counted.count += 1
            return weight

    for channels in (3, 16):
        layer = Conv2d(channels, channels, 3)
        nn.utils.parametrize.register_parametrization(layer, "weight", Counted())
        Counted.count = 0
        layer(maps(1, channels, 16, 16, layout=torch.channels_last))
        assert Counted.count == 1


# --- transforms of torch.func -----------------------------------------------------------------------------------------

CELLS = [ConvLSTMCell(3, 4, 3), EDLSTMCell(3, 4, (6, 8)), EncLSTMDecCell(3, 4, (6, 8))]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("cell", CELLS)
def test_an_ensemble_is_its_members(cell: nn.Module, layout: torch.memory_format) -> None:
    members = [copy.deepcopy(cell).to(memory_format=layout) for _ in range(2)]  # type: ignore[call-overload]
    for parameter in members[1].parameters():
        parameter.data.mul_(0.9)
    stacked, x = torch.func.stack_module_state(members), maps(1, 3, 16, 16, layout=layout)
    together = torch.func.vmap(lambda *state: torch.func.functional_call(cell, state, (x,))[0])(*stacked)
    torch.testing.assert_close(together, torch.stack([member(x)[0] for member in members]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("network", [*CELLS, Bottleneck(3, 3), Bottleneck(16, 16)])
def test_transforms_over_one_weight_alone(network: nn.Module, layout: torch.memory_format) -> None:
    """Most of the network then works on tensors that the transform does not see."""
    network.to(memory_format=layout)  # type: ignore[call-overload]
    x = given(network).contiguous(memory_format=layout)
    name, weight = list(network.named_parameters())[-1]

    def of(weight: Tensor) -> Tensor:
        found = torch.func.functional_call(network, {name: weight}, (x,))
        return (found[0] if isinstance(found, tuple) else found).square().sum()  # type: ignore[no-any-return]

    (expected,) = torch.autograd.grad(of(weight), weight)
    torch.testing.assert_close(torch.func.grad(of)(weight.detach()), expected)
    batch = torch.stack([weight.detach(), 2 * weight.detach()])
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(of)(batch), torch.stack([of(each) for each in batch]))
    tangent = torch.ones_like(weight)
    torch.testing.assert_close(
        torch.func.jvp(of, (weight.detach(),), (tangent,))[1], (expected * tangent).sum(), rtol=1e-4, atol=1e-4
    )


# --- copies without it ------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def pruned_twice(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_structured(layer, "weight", 0.3, dim=0)
    prune.l1_unstructured(layer, "bias", 0.5)


def with_old_weight_norm(layer: nn.Module) -> None:
    with pytest.warns(FutureWarning):
        weight_norm(layer)


COMPUTED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruned more than once": pruned_twice,
    "weight_norm, a hook": with_old_weight_norm,
    "spectral_norm, a hook": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own, of the weight": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
    "own, of the bias": lambda layer: nn.utils.parametrize.register_parametrization(layer, "bias", Doubled()),
}


@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_plain_copy_has_parameters_of_these_values(compute: Callable[[nn.Module], object]) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Conv2d(2, 3, 3), nn.LeakyReLU(), Conv2d(3, 3, 3))
    plain = {name for name, _ in network.named_parameters()}
    for layer in (network[0], network[2]):
        compute(layer)
    x = maps(1, 2, 8, 8)
    network(x).sum().backward()  # weights that hooks have made have a history then, and are behind the parameters
    torch.optim.SGD(network.parameters(), 0.1).step()
    copied = plain_copy(network)
    names, before = list(network.state_dict()), copy.deepcopy(network.state_dict())
    assert {name for name, _ in copied.named_parameters()} == plain
    assert set(copied.state_dict()) == plain
    assert not is_intercepted(copied)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    torch.testing.assert_close(copied(x), network.eval()(x).detach())
    assert list(network.state_dict()) == names
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert type(copied[0]) is Conv2d
    network.train()(x).sum().backward()  # which is left as it was


@pytest.mark.parametrize("compute", [COMPUTED["pruned"], COMPUTED["weight_norm, a hook"]], ids=["pruned", "normed"])
def test_weights_that_hooks_make_are_renewed(compute: Callable[[nn.Module], object]) -> None:
    layer = nn.Linear(3, 3)
    compute(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
    behind = layer.weight.detach().clone()
    renew_weights(nn.Sequential(layer))
    renewed = layer.weight.detach().clone()
    layer(torch.rand(1, 3))
    assert not torch.equal(renewed, behind)
    assert torch.equal(renewed, layer.weight)


# --- the layers that a class makes ------------------------------------------------------------------------------------


def test_options_and_whoever_looks_make_a_network_another() -> None:
    made = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    assert is_as_made(copy.deepcopy(made), made)
    assert not is_as_made(nn.Sequential(nn.Conv2d(1, 2, 3, padding_mode="reflect"), nn.ReLU()), made)
    assert not is_as_made(nn.Sequential(nn.Conv2d(1, 2, 3)), made)
    for change in (*WATCHED.values(), COMPUTED["own, of the weight"], COMPUTED["pruned"]):
        network = copy.deepcopy(made)
        change(network[0])
        assert not is_as_made(network, made)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(1, 2, 3), nn.Tanh()], r"reads the layers that Sequential is made of: '1' is Tanh\(\) in place of"),
        ([nn.Conv2d(1, 2, 3), nn.LeakyReLU(0.3)], r"'1' is LeakyReLU\(negative_slope=0.3\) in place of LeakyReLU"),
        ([nn.Conv2d(1, 2, 3)], "'1' is missing"),
        ([nn.Conv2d(1, 2, 3), nn.LeakyReLU(), nn.Dropout()], r"'2' is Dropout\(p=0.5, inplace=False\)$"),
        ([nn.Sequential(nn.Conv2d(1, 2, 3)), nn.LeakyReLU()], r"'0' is Sequential\(\) in place of Conv2d"),
    ],
)
def test_another_layer_is_refused(layers: list[nn.Module], message: str) -> None:
    made = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LeakyReLU())
    with pytest.raises(TypeError, match=message):
        check_as_made("this", nn.Sequential(*layers), made)


def test_layers_that_do_the_same_are_not_refused() -> None:
    made = nn.Sequential(Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.LeakyReLU())
    network = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(made))
    network[2].inplace = True
    parametrizations.weight_norm(network[0])
    check_as_made("this", network, made)
    check_as_made("this", torch.compile(network), made)
    network[1] = nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(TypeError, match=r"'1' is BatchNorm2d\(.*track_running_stats=False\) in place of"):
        check_as_made("this", network, made)


def test_a_forward_of_its_own_and_hooks_are_refused() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    check_without_hooks("this", network)
    network[0].register_forward_hook(lambda *given: None)
    with pytest.raises(TypeError, match="this does not call hooks, and '0' has some; remove them"):
        check_without_hooks("this", network)
    patched(network[0])
    with pytest.raises(TypeError, match=r"does not call the `forward` that was set on '0', Conv2d\(1, 2.*; remove it"):
        check_as_made("this", network, nn.Sequential(nn.Conv2d(1, 2, 3)))
