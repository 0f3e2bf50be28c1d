"""Bytes and operations of every benchmark against counts that are made another way, on small shapes."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vpfast.benchmarks.models import bench_hrvqvae, bench_mspn, bench_sampler
from vpfast.benchmarks.models._convolutions import Convolution, alone, convolutions_of, flops_of
from vpfast.benchmarks.ops import bench_codeword_search, bench_edlstm_gates, bench_masked_attention3d
from vpfast.benchmarks.problem import Place
from vpfast.models import MSPN, MSPNConfig, SHRVQVAEConfig
from vpfast.ops import Mask3d
from vpfast.ops.edlstm_gates import reference

SMALL = Place(small=True)


class Counted:
    """A number that counts what is done with it."""

    done = 0

    def _operation(self, *others):
        Counted.done += 1
        return Counted()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _operation
    exp = _operation


def sigmoid(x):
    return 1 / (1 + x.exp())


def tanh(x):
    twice = x.exp()
    return (twice - 1) / (twice + 1)


def test_operations_of_the_gates():
    Counted.done = 0
    f, i, o, g, c_prev = (Counted() for _ in range(5))
    f, i, o, g = sigmoid(f), sigmoid(i), sigmoid(o), tanh(g)
    c = f * c_prev + i * g
    t = tanh(c)
    forward = Counted.done
    assert o * t
    assert Counted.done == bench_edlstm_gates.FLOPS["forward"]
    Counted.done = forward  # backward has no use for h
    dh, dc = Counted(), Counted()
    dc = dc + dh * o * (1 - t * t)
    assert [dh * t * o * (1 - o), dc * c_prev * f * (1 - f), dc * g * i * (1 - i), dc * i * (1 - g * g), dc * f]
    assert Counted.done == bench_edlstm_gates.FLOPS["backward"]


def test_bytes_of_the_gates():
    setting = bench_edlstm_gates.Setting("", (2, 8, 3, 5), "forward + backward", dtype=torch.float64)
    gates, c_prev = torch.randn(2, 8, 3, 5).double().requires_grad_(), torch.randn(2, 2, 3, 5).double().requires_grad_()
    outputs = reference.edlstm_gates(gates, c_prev)
    grads = [torch.ones_like(out) for out in outputs]
    found = torch.autograd.grad(outputs, (gates, c_prev), grads)
    forward = sum(tensor.nbytes for tensor in (gates, c_prev, *outputs))
    assert setting.moved == forward + sum(tensor.nbytes for tensor in (gates, c_prev, *grads, *found))
    assert setting.flops == (21 + 42) * c_prev.numel()


@pytest.mark.parametrize(("layers", "tree"), [(1, True), (3, True), (3, False)])
def test_bytes_and_operations_of_a_search(layers, tree):
    setting = bench_codeword_search.Setting("", 7, 5, 4, layers, strict_tree=tree)
    z, codebooks = setting.draw()
    quantized, indices = bench_codeword_search.codeword_search(z, codebooks, tree)
    assert setting.moved == z.nbytes + quantized.nbytes + indices.nbytes
    assert setting.flops == sum(2 for _ in itertools.product(range(7), range(layers), range(4), range(5)))


def test_bytes_of_training_a_quantizer():
    setting = bench_codeword_search.Setting("", 7, 5, 4, 3, train=True)
    z, codebooks = setting.draw()
    quantized, indices = bench_codeword_search.codeword_search(z, codebooks)
    forward = z.nbytes + quantized.nbytes + indices.nbytes
    assert setting.moved == forward + z.nbytes + indices.nbytes + quantized.nbytes + z.nbytes


RULES = {
    "raster": lambda t, j, s, k: s < t or (s == t and k <= j),
    "eq6": lambda t, j, s, k: s < t and k < j,
    "separable": lambda t, j, s, k: s <= t and k <= j,
    "past_frames": lambda t, j, s, k: s < t,
}


@pytest.mark.parametrize("name", RULES)
def test_bytes_and_operations_of_attention(name):
    grid, heads, dim = (3, 2, 4), 2, 8
    places = list(itertools.product(range(3), range(8)))
    pairs = sum(RULES[name](*query, *key) for query in places for key in places)
    forward = bench_masked_attention3d.Setting(Mask3d(name), grid, heads, dim)
    both = bench_masked_attention3d.Setting(Mask3d(name), grid, heads, dim, backward=True)
    assert forward.flops == pairs * heads * (2 * dim + 2 * dim)
    assert both.flops - forward.flops == pairs * heads * 5 * 2 * dim
    q, k, v, grad = forward.draw("cpu")
    lse = torch.empty(1, heads, len(places))
    assert forward.moved == sum(tensor.nbytes for tensor in (q, k, v, grad, lse))  # the output is as large as grad
    assert both.moved - forward.moved == sum(tensor.nbytes for tensor in (q, k, v, grad, grad, lse, q, k, v))


def test_what_decode_reads():
    setting = bench_masked_attention3d.Setting(Mask3d("raster"), (3, 2, 4), 2, 8, decode=2)
    assert setting.flops == (23 + 24) * 2 * 4 * 8
    assert setting.moved == 2 * 8 * 4 * 2 * (24 + 2)
    blind = bench_masked_attention3d.Setting(Mask3d("eq6"), (3, 2, 4), 2, 8, decode=1)
    assert blind.moved == 2 * 8 * 4 * 2 * (2 * 7 + 1)


def test_operations_of_mspn():
    model = MSPN(MSPNConfig.preset("compact")).eval()
    frames = torch.rand(2, 3, 1, 16, 16)
    counted = convolutions_of(model, lambda: model.predict(frames[:, :1], 0))
    with FlopCounterMode(display=False) as counter:
        model.predict(frames, 2)
    assert flops_of(counted) * 5 == counter.get_total_flops()
    assert bench_mspn.SMALL.case().prepare(SMALL).flops > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_alone_is_that_convolution(stride):
    convolution = Convolution(2, 3, 8, 6, 5, (3, 3), (stride, stride), (1, 1), True)
    run = convolution.call(torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.conv2d(torch.rand(2, 3, 8, 6), torch.rand(5, 3, 3, 3), stride=stride, padding=1)
    assert convolution.flops == counter.get_total_flops()
    assert run().shape == (2, 5, 8 // stride, 6 // stride)
    assert alone({convolution: 3}, torch.float32, SMALL, 0.001) > 0


def test_operations_of_encoding():
    problem = bench_hrvqvae.Setting("mnist-3x4").case().prepare(SMALL)
    model = bench_hrvqvae.HRVQVAE(SHRVQVAEConfig.preset("mnist-3x4"))
    with FlopCounterMode(display=False) as counter:
        model.encoder(torch.rand(20, 1, 16, 16))
    search = 20 * 4 * 4 * 3 * 4 * 2 * 4  # vectors, layers, codewords, components
    assert problem.flops == counter.get_total_flops() + search
    assert problem.moved == 20 * 16 * 16 * 4 + 20 * 4 * 4 * 3 * 8


def test_operations_of_sampling():
    config = SHRVQVAEConfig.preset("mnist-3x4")
    C, A = 64, 4 * 16
    stem = (9 + 4 + 1 + 1) * C * C  # taps of the past and the present frame, the code before, mixing
    blocks = 6 * ((9 + 5) * C * 2 * C + C * C)
    attentions = 3 * (3 * C * A + A * C + 2 * C * 256)
    heads = 3 * (2 * C * 160 + C * 4)
    context, horizon, size = 2, 3, (3, 4)
    positions = range(context * 12, (context + horizon) * 12)
    scores = sum(3 * (position + 1) * 2 * 2 * A for position in positions)
    wanted = len(positions) * 2 * (stem + blocks + attentions + heads) + scores
    assert bench_sampler.flops_of(config, size, context, horizon) == wanted
    assert bench_sampler.bytes_of(config, size, context, horizon) == scores // (4 * A) * 2 * A * 4
