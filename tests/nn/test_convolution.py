"""Where vpfast's Conv2d transforms its weights, how often, and the Bottleneck that fuses what stands around it."""

import copy

import pytest
import torch
import torch.nn.functional as F

import vpfast
from vpfast.models import MSPN, MSPNConfig
from vpfast.nn.bottleneck import LEAK, Bottleneck
from vpfast.nn.convolution import Conv2d, fuses, transformed, weights_in_use
from vpfast.ops import _winograd_convolution as winograd

served = pytest.mark.skipif(not winograd.has_registers(), reason="needs the compiled extension and AVX2")
OPERATORS = torch.ops.vpfast
SMALL = {"channels": (16, 32, 32), "levels": 2, "hidden_channels": 16}


def maps(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)


@pytest.fixture
def transforms(monkeypatch):
    """The shapes of weights that were transformed, and whether for the gradient of the input."""
    seen = []
    operator = OPERATORS.winograd_weights

    def counted(weight, transposed):
        seen.append((tuple(weight.shape), transposed))
        return operator(weight, transposed)

    monkeypatch.setattr(OPERATORS, "winograd_weights", counted)
    return seen


@served
def test_weights_are_transformed_for_every_call_or_once_while_in_use(transforms):
    convolution, x = Conv2d(16, 16, 3), maps(1, 16, 8, 8)
    convolution(x), convolution(x)
    assert len(transforms) == 2
    transforms.clear()
    with weights_in_use():
        first = convolution(x)
        with weights_in_use():
            second = convolution(x)
        third = convolution(x)
    assert len(transforms) == 1
    assert torch.equal(first, second)
    (first + second + third).sum().backward()
    assert transforms == [((16, 16, 3, 3), False)]  # x needs no gradient


@served
def test_a_weight_that_was_written_into_is_transformed_anew():
    convolution, x = Conv2d(16, 16, 3), maps(1, 16, 8, 8)
    kept = {}
    for _ in range(2):
        with weights_in_use(kept), torch.no_grad():
            torch.testing.assert_close(convolution(x), F.conv2d(x, convolution.weight, convolution.bias, padding=1))
            convolution.weight.mul_(2)
            torch.testing.assert_close(convolution(x), F.conv2d(x, convolution.weight, convolution.bias, padding=1))


@served
def test_kept_transforms_outlast_their_use(transforms):
    convolution, x, kept = Conv2d(16, 16, 3), maps(1, 16, 8, 8), {}
    for _ in range(3):
        with weights_in_use(kept), torch.no_grad():
            convolution(x)
    assert len(transforms) == 1


def test_only_parameters_are_known_again():
    weight = torch.nn.Parameter(torch.rand(16, 16, 3, 3))
    with weights_in_use():
        assert transformed(weight) is transformed(weight)
        assert transformed(weight * 1) is not transformed(weight * 1)
    assert transformed(weight) is not transformed(weight)


@served
def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        convolution, x = Conv2d(16, 16, 3), maps(1, 16, 8, 8)
        with weights_in_use():
            found = convolution(x)
        torch.testing.assert_close(found, F.conv2d(x, convolution.weight, convolution.bias, padding=1))


@served
@pytest.mark.parametrize("channels", [(16, 24), (48, 16), (3, 16)], ids=str)
def test_a_bottleneck_gives_the_same_bits_with_and_without_gradients(channels):
    torch.manual_seed(0)
    block, x = Bottleneck(*channels).to(memory_format=torch.channels_last), maps(2, channels[0], 7, 10)
    assert fuses(block.body[0], x) == (min(channels) >= winograd.LEAST_CHANNELS)
    with torch.no_grad():
        alone = block(x)
    assert torch.equal(block(x), alone)
    with vpfast.backend("reference"):
        torch.testing.assert_close(alone, F.leaky_relu(block.body(x) + block.skip(x), LEAK))


@served
def test_a_clip_transforms_each_weight_once_each_way(transforms):
    model = MSPN(MSPNConfig(in_channels=1, **SMALL)).to(memory_format=torch.channels_last)
    wide = [m.weight for m in model.modules() if isinstance(m, Conv2d) and winograd.is_wide(m.weight)]
    model(torch.rand(1, 3, 1, 16, 16), 2).predictions[0].sum().backward()
    forward = [shape for shape, transposed in transforms if not transposed]
    assert sorted(forward) == sorted(tuple(weight.shape) for weight in wide)
    assert len(transforms) <= 2 * len(wide)


def test_a_clip_gives_the_bits_of_its_steps_and_the_gradients_of_torchs_convolutions():
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, **SMALL)).to(memory_format=torch.channels_last)
    frames, state = torch.rand(2, 3, 1, 16, 16), model.init_state(2, 16, 16)
    output = model(frames)
    for time, expected in enumerate(output.predictions[0].unbind(1)):
        prediction, state = model.step(frames[:, time], state)
        assert torch.equal(prediction, expected)
    twin = copy.deepcopy(model)
    output.predictions[0].square().sum().backward()
    with vpfast.backend("reference"):
        twin(frames).predictions[0].square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_what_optimize_made_stays_as_it_is():
    torch.manual_seed(0)
    model = MSPN(MSPNConfig(in_channels=1, recurrence="enc_lstm_dec", **SMALL)).eval()
    frames = torch.rand(1, 3, 1, 16, 16)
    fast, expected = vpfast.optimize(model), model.predict(frames, 2)
    torch.testing.assert_close(fast.predict(frames, 2), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(fast.predict(frames, 2), expected)
