"""Where vpfast's Conv2d transforms its weights, how often, and the Bottleneck that fuses what stands around it."""

import copy
import gc
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import prune

import vpfast
from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn.cpu import LaidOutMSPN
from vpfast.nn.bottleneck import LEAK, Bottleneck, _can_fuse
from vpfast.nn.convolution import Conv2d, weights_in_use
from vpfast.ops import _winograd_convolution as winograd
from vpfast.ops._backend import has_registers

served = pytest.mark.skipif(not has_registers(), reason="needs the compiled extension and AVX2")
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


@served
def test_only_parameters_are_known_again(transforms):
    weight, x = torch.nn.Parameter(torch.rand(16, 16, 3, 3)), maps(1, 16, 8, 8)
    convolution = Conv2d(16, 16, 3)
    with weights_in_use():
        for factor in (1.0, 2.0):
            given = {"weight": weight * factor, "bias": None}
            found = torch.func.functional_call(convolution, given, (x,))
            torch.testing.assert_close(found, F.conv2d(x, given["weight"], padding=1))
    assert len(transforms) == 2


@served
def test_weights_made_in_inference_mode():
    with torch.inference_mode(), weights_in_use():
        convolution, x = Conv2d(16, 16, 3), maps(1, 16, 8, 8)
        for _ in range(2):
            torch.testing.assert_close(convolution(x), F.conv2d(x, convolution.weight, convolution.bias, padding=1))
            convolution.weight.mul_(2)


@served
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_leave_no_transforms_behind(transforms, monkeypatch, recompute):
    made = []
    original = winograd.TransformedWeight.__init__

    def counted(self, weight):
        made.append(self)
        original(self, weight)

    monkeypatch.setattr(winograd.TransformedWeight, "__init__", counted)
    model = MSPN(MSPNConfig(in_channels=1, **SMALL)).to(memory_format=torch.channels_last)
    loss = model(torch.rand(1, 3, 1, 16, 16), 1, recompute=recompute).predictions[0].sum()
    assert not any(each._made for each in made)
    forward = len(transforms)
    loss.backward()
    assert not any(each._made for each in made)
    assert len(transforms) <= (3 if recompute else 2) * forward


@served
def test_a_backward_pass_that_failed_leaves_nothing_to_the_next():
    convolution, x = Conv2d(16, 16, 3), maps(1, 16, 8, 8).requires_grad_()
    with weights_in_use():
        loss = convolution(x).sum()

    def fail(grad):
        raise RuntimeError("on purpose")

    handle = x.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        loss.backward(retain_graph=True)
    handle.remove()
    convolution.weight.data.mul_(0)
    loss.backward()
    assert x.grad.count_nonzero() == 0


def test_a_bias_of_another_type_is_refused_in_torchs_words():
    for layer, x in ((Conv2d(16, 16, 3), maps(1, 16, 8, 8)), (Conv2d(2, 3, 3), torch.rand(1, 2, 8, 16))):
        layer.bias.data = layer.bias.data.double()
        with pytest.raises(RuntimeError, match="bias type"):
            layer(x)


@served
def test_a_step_alone_keeps_nothing():
    convolution, x = Conv2d(16, 16, 3), maps(1, 16, 8, 8).requires_grad_()
    y = convolution(x)
    assert y.grad_fn.known is None
    y.sum().backward()
    expected = torch.nn.grad.conv2d_input(x.shape, convolution.weight, torch.ones_like(y), padding=1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


@served
def test_hooks_and_parametrized_weights_of_a_bottleneck_are_seen():
    torch.manual_seed(0)
    block, x, seen = Bottleneck(16, 16), maps(1, 16, 8, 8), []
    handle = block.body[0].register_forward_hook(lambda *given: seen.append(given))
    with torch.no_grad():
        block(x)
        handle.remove()
        block(x)
        assert len(seen) == 1
        handle = torch.nn.modules.module.register_module_forward_hook(lambda part, *given: seen.append(part))
        block(x)
        handle.remove()
        assert all(part in seen for part in block.modules())
        prune.l1_unstructured(block.body[2], "weight", 0.5)
        block.body[2].weight_orig.mul_(2)
        expected = F.leaky_relu(block.body(x) + block.skip(x), LEAK)
        torch.testing.assert_close(block(x), expected)
        block = Bottleneck(16, 16)
        block.body[1] = torch.nn.ReLU()
        torch.testing.assert_close(block(x), F.leaky_relu(block.body(x) + block.skip(x), LEAK))


@pytest.mark.parametrize("layer", [Conv2d(16, 16, 3), Conv2d(2, 3, 3)], ids=["wide", "narrow"])
def test_what_is_made_of_the_bias_alone_is_seen(layer):
    wide = layer.in_channels == 16
    x = maps(1, 16, 8, 8) if wide else torch.rand(1, 2, 8, 16)

    def total(bias):
        return torch.func.functional_call(layer, {"bias": bias}, (x,)).sum()

    expected = torch.full((layer.out_channels,), float(x[0, 0].numel()))
    torch.testing.assert_close(torch.func.grad(total)(layer.bias.detach()), expected)
    with torch.no_grad():
        _, tangent = torch.func.jvp(total, (layer.bias.detach(),), (torch.ones(layer.out_channels),))
    torch.testing.assert_close(tangent, expected.sum())


@pytest.mark.parametrize("layer", [Conv2d(16, 16, 3), Conv2d(2, 3, 3)], ids=["wide", "narrow"])
def test_wrong_channels_are_refused_in_torchs_words_and_traces_hold_torchs_operators(layer):
    with pytest.raises(RuntimeError, match=f"expected input.* to have {layer.in_channels} channels, but got 32"):
        layer(maps(1, 32, 8, 16))
    with pytest.raises(RuntimeError, match=f"expected input.* to have {layer.in_channels} channels, but got 32"):
        layer(maps(1, 32, 8, 16).contiguous())
    x = maps(1, layer.in_channels, 8, 16)
    traced = torch.jit.trace(layer, (x,))
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


@served
@pytest.mark.parametrize("channels", [(16, 24), (48, 16), (3, 16)], ids=str)
def test_a_bottleneck_gives_the_same_bits_with_and_without_gradients(channels):
    torch.manual_seed(0)
    block, x = Bottleneck(*channels).to(memory_format=torch.channels_last), maps(2, channels[0], 7, 10)
    with torch.no_grad():
        assert _can_fuse(list(block.body), x, block.skip(x)) == (min(channels) >= winograd.LEAST_CHANNELS)
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


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_copies_of_what_optimize_made_know_their_own_weights(copied):
    """Whose identities may be those of weights that are gone."""
    torch.manual_seed(0)
    frames = torch.rand(1, 3, 1, 16, 16)
    fast = LaidOutMSPN(MSPN(MSPNConfig(in_channels=1, **SMALL)).eval(), None)
    expected = fast.predict(frames, 2)
    for _ in range(10):
        fast = copied(fast)
        gc.collect()
        assert torch.equal(fast.predict(frames, 2), expected)


def test_a_model_in_bfloat16_takes_frames_of_its_type_alone():
    model = MSPN(MSPNConfig(in_channels=1, **SMALL)).eval().bfloat16()
    fast = LaidOutMSPN(model, None)
    assert fast.predict(torch.rand(1, 3, 1, 16, 16).bfloat16(), 1).dtype == torch.bfloat16
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(TypeError, match="bfloat16"):
            fast.predict(torch.rand(1, 3, 1, 16, 16, dtype=dtype), 1)
