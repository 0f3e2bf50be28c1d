"""Sampling of codes from the ST-PixelCNN: every layer's inputs are kept, so that a position costs one evaluation.

:func:`sample_naively` is the specification, a full forward pass for every code; :func:`sample` gives the same codes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from vpfast.models._frames import check_count, require, values_can_be_read
from vpfast.models.shrvqvae import captured, compiled
from vpfast.models.shrvqvae.cache import NetworkCache, Places, Window
from vpfast.models.shrvqvae.random import Choice, clip_keys
from vpfast.models.shrvqvae.st_pixelcnn import STPixelCNN, as_made
from vpfast.nn._as_made import check_as_made, renew_weights
from vpfast.nn._common import as_integer, as_number, check_choice
from vpfast.ops._backend import BackendError, autocast_is_on, current_backend, is_transformed
from vpfast.ops._sample_codes import NOT_FINITE

Order = Literal["pipelined", "plain"]


def sample(
    prior: STPixelCNN,
    codes: Tensor,
    horizon: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    num_futures: int | None = None,
    progress: bool = False,
    order: Order = "pipelined",
) -> Tensor:
    """The codes of the frames that follow: int64 (B, T, H, W, n) -> (B, horizon, H, W, n).

    A frame's positions come in raster order, all layers of one at a time; with ``code_order="layers"`` once for each
    layer. Where a code does not depend on others, they are evaluated together: with ``conditioning="past_frames"`` all
    positions of a frame, with ``"eq6"`` one position in all frames, and all of a frame in one layer with
    ``code_order="layers"``.

    Args:
        prior: the network.
        codes: of T frames, 0 or more.
        horizon: how many frames to sample, 0 or more.
        temperature: 0 takes the likeliest code; above it codes are drawn from softmax(logits / temperature).
        top_k: draw from this many likeliest codes of a layer only; 1 to M.
        seed: of what is drawn, in [0, 2^32): one for all clips, or one a clip. A clip draws what it draws alone.
        num_futures: sample as many futures of each clip: the result is (B, num_futures, horizon, H, W, n).
        progress: show a bar; needs tqdm.
        order: ``"plain"`` chooses codes one by one all the same, which gives the same codes.

    Memory grows with the length of the clip: the inputs of every convolution, keys and values. Layers are evaluated by
    their weights, and hooks on them do not run; those of torch's that make weights do.

    Raises:
        TypeError, ValueError: an argument that cannot be; the message holds it. ValueError where logits are not finite.
            TypeError where a layer of the prior was replaced.
        ImportError: a bar without tqdm.
    """
    if not torch.compiler.is_compiling():
        check_as_made("sample", prior, as_made(prior.config))
        renew_weights(prior)
    _check(prior, codes)
    check_choice("sample", "order", order, get_args(Order))
    if torch.compiler.is_compiling():
        _check_compilable(prior, codes)
    horizon = check_count("horizon", horizon)
    num_futures, futures = _futures(num_futures)
    batch, context, height, width, layers = codes.shape
    choice = _choice(prior, temperature, top_k, clip_keys(seed, batch, futures).to(codes.device))
    if batch * horizon == 0:
        return _split(codes.new_empty(batch * futures, horizon, height, width, layers), num_futures)
    with _quietly(codes), _bar(progress, horizon * height * width * layers) as update:
        clip = _Clip(prior, codes, horizon, choice, update)
        clip.look_at(context)
        clip.repeat(futures)
        clip.sample(range(context, context + horizon), order)
        clip.check()
    return _split(clip.codes[:, context * height * width :].unflatten(1, (horizon, height, width)), num_futures)


class _Clip:
    """The codes of clips as far as they are known, with what the network keeps of them.

    ``codes``: int64 (B, T H W, n). ``seen``: (B, cells, C), the codes as the stem sees them in past frames.
    ``networks``: one, or one for each layer of codes, where each has a pass of its own.
    ``total``: the sum of all logits, finite only if each of them is.
    """

    def __init__(
        self, prior: STPixelCNN, codes: Tensor, horizon: int, choice: Choice, update: Callable[[int], object]
    ) -> None:
        batch, context, height, width, layers = codes.shape
        self.prior, self.choice, self.update = prior, choice, update
        self.size = (height, width)
        self.by_layer = prior.config.code_order == "layers"
        grid = (context + horizon, height, width)
        stem = Window(prior.stem, grid, prior.carry is not None, codes.device)
        block = Window(prior.blocks[0].conv, grid, False, codes.device)  # type: ignore[arg-type]
        self.windows = (stem, block)
        self.networks = [NetworkCache(prior, self.windows, batch, grid) for _ in range(layers if self.by_layer else 1)]
        self.seen = self.networks[0].stem.inputs
        if self.by_layer:
            self.seen = torch.zeros_like(self.seen)
        self.codes = codes.new_zeros(batch, (context + horizon) * height * width, layers)
        self.codes[:, : context * height * width] = codes.flatten(1, 3)
        self.total = torch.zeros((), dtype=torch.float64, device=codes.device)

    def repeat(self, futures: int) -> None:
        """Every clip as often, one after another."""
        if futures == 1:
            return
        self.codes = self.codes.repeat_interleave(futures, 0)
        for network in self.networks:
            network.repeat(futures)
        self.seen = self.seen.repeat_interleave(futures, 0) if self.by_layer else self.networks[0].stem.inputs

    def check(self) -> None:
        """Raise ValueError where logits were not finite."""
        require(torch.isfinite(self.total), NOT_FINITE)

    def look_at(self, context: int) -> None:
        """Bring in the first frames, whose codes are known."""
        if context == 0:
            return
        cells = math.prod(self.size)
        codes = self.codes[:, : context * cells]
        window = self.windows[0]
        own = (torch.arange(context, device=codes.device)[:, None] * window.frame + window.own).flatten()
        begun = self.prior._inputs_of_blocks(codes.unflatten(1, (context, *self.size))).unflatten(
            0, (codes.shape[0], -1)
        )
        for layer, network in enumerate(self.networks):
            shown = range(layer, layer + 1) if self.by_layer else None
            network.stem.inputs.index_copy_(1, own, self.prior._embedded(codes, shown))
            network.look_at(begun[:, layer], own)
        if self.by_layer:
            self.seen.index_copy_(1, own, self.prior._embedded(codes))

    def sample(self, times: range, order: Order) -> None:
        """Choose the codes of these frames, which follow what is known."""
        config = self.prior.config
        if config.conditioning == "eq6" and order == "pipelined" and not self.by_layer:
            self.sample_across(times)
            return
        passes: list[compiled.CompiledPass] = []
        if compiled.serves(self.prior, self.codes):
            layers = range(len(self.networks)) if self.by_layer else [None]
            passes = [compiled.CompiledPass(self.prior, *each) for each in zip(self.networks, layers, strict=True)]
        recorded = self.recorded_passes()
        for time in times:
            for layer in range(len(self.networks)):
                self.begin_frame(time, layer)
                if passes:
                    self.sample_compiled(passes[layer], time)
                elif recorded:
                    recorded[layer].sample(time)
                    self.count(math.prod(self.size))
                elif config.conditioning == "raster" or (config.conditioning == "eq6" and order == "plain"):
                    self.sample_one_by_one(time, layer)
                elif order == "plain":
                    self.sample_within(time, layer)
                else:
                    places = self.frame(time)
                    self.choose(self.networks[layer].evaluate(places), places, layer)
            if self.by_layer:
                self.remember(self.frame(time))
        captured.give_back(self.prior, recorded)

    def sample_compiled(self, network: compiled.CompiledPass, time: int) -> None:
        """The positions of a frame in raster order, by the compiled kernel."""
        if not network.sample(self.codes, time, self.size, self.choice):
            raise ValueError(NOT_FINITE)
        self.count(math.prod(self.size))

    def recorded_passes(self) -> list[captured.CapturedPass]:
        """For each network, where the step of a position can be recorded."""
        recorder = captured.recorder_for(self.prior)
        if recorder is None:
            return []

        def step(layer: int, place: Places) -> None:
            self.decide(self.networks[layer].evaluate(place), place, layer)

        return [
            captured.CapturedPass(recorder, network, self.frame, partial(step, layer))
            for layer, network in enumerate(self.networks)
        ]

    def sample_one_by_one(self, time: int, layer: int) -> None:
        """The positions of a frame in raster order."""
        evaluate = self.networks[layer].evaluate
        for place in self.frame(time).each():
            self.choose(evaluate(place), place, layer)

    def sample_within(self, time: int, layer: int) -> None:
        """Likewise where the features of a frame know each other: all of them again for every position."""
        places = self.frame(time)
        for cell, place in enumerate(places.each()):
            self.choose(self.networks[layer].evaluate(places)[:, cell : cell + 1], place, layer)

    def sample_across(self, times: range) -> None:
        """One position of all frames after another: the codes of a frame show later positions of later frames only."""
        network, all_times = self.networks[0], torch.tensor(times, device=self.codes.device)
        network.end_frames()
        for cell in range(math.prod(self.size)):
            places = self.places(all_times, torch.full_like(all_times, cell), past=True)
            self.choose(network.evaluate(places), places, 0)

    def places(self, times: Tensor, cells: Tensor, past: bool = False) -> Places:
        """Positions ``cells`` (P,) of frames ``times`` (P,); their present taps, or ``past`` ones before those."""
        stem, block = self.windows
        shift = times * stem.frame
        tables = [torch.cat((window.past, window.present), 1) if past else window.present for window in self.windows]
        taps = [(table[cells] + shift[:, None]).flatten() for table in tables]
        return Places(times * math.prod(self.size) + cells, times, cells, block.own[cells] + shift, taps[0], taps[1])

    def frame(self, time: int) -> Places:
        """All positions of a frame."""
        cells = torch.arange(math.prod(self.size), device=self.codes.device)
        return self.places(torch.full_like(cells, time), cells)

    def begin_frame(self, time: int, layer: int) -> None:
        """Bring past frames, and layers of this one that come before ``layer``, into the pass of ``layer``."""
        added = None
        if self.prior.layer is not None:
            added = self.prior.layer.weight[layer]
            if layer > 0:
                assert self.prior.context is not None
                known = self.codes.unflatten(1, (-1, *self.size))[:, time]
                below = self.prior._embedded(known, range(layer)).movedim(-1, 1)
                added = added + self.prior.context(below).movedim(1, -1).flatten(1, 2)
        self.networks[layer].begin_frame(time, self.seen, added)

    def choose(self, features: Tensor, places: Places, layer: int) -> None:
        """:meth:`decide`, and tell how many codes were chosen."""
        self.decide(features, places, layer)
        self.count(len(places.positions))

    def count(self, positions: int) -> None:
        """Tell that the codes of so many more positions were chosen, in one pass."""
        self.update(positions * (1 if self.by_layer else self.codes.shape[-1]))

    def decide(self, features: Tensor, places: Places, layer: int) -> None:
        """Choose the codes at ``places`` by their features (B, P, C): of all layers, or of the layer of this pass."""
        codes = self.codes.index_select(1, places.positions)
        layers = range(layer, layer + 1) if self.by_layer else range(codes.shape[-1])
        for each in layers:
            logits = self.prior._logits_of(features, each, codes[..., :each])
            self.total += logits.sum(dtype=torch.float64)
            codes[..., each] = self.choice(logits, places.times, places.cells, each)
        self.codes.index_copy_(1, places.positions, codes)
        self.show(places, layer)

    def show(self, places: Places, layer: int) -> None:
        """Show the codes at ``places`` to the positions after them in the pass of ``layer``."""
        codes = self.codes.index_select(1, places.positions)
        embedded = self.prior._embedded(codes, range(layer, layer + 1) if self.by_layer else None)
        self.networks[layer].stem.inputs.index_copy_(1, places.own, embedded)

    def remember(self, places: Places) -> None:
        """Show the codes of a whole frame to later frames, where these see more than the frame itself."""
        if self.by_layer:
            codes = self.codes.index_select(1, places.positions)
            self.seen.index_copy_(1, places.own, self.prior._embedded(codes))


def sample_naively(
    prior: STPixelCNN,
    codes: Tensor,
    horizon: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int | Sequence[int] = 0,
    num_futures: int | None = None,
    progress: bool = False,
) -> Tensor:
    """What :func:`sample` is to give, by a forward pass over the whole clip for every code."""
    _check(prior, codes)
    horizon = check_count("horizon", horizon)
    num_futures, futures = _futures(num_futures)
    batch, context, height, width, layers = codes.shape
    choice = _choice(prior, temperature, top_k, clip_keys(seed, batch, futures).to(codes.device))
    clip = torch.cat((codes, codes.new_zeros(batch, horizon, height, width, layers)), 1).repeat_interleave(futures, 0)
    cells, by_layer = range(height * width), prior.config.code_order == "layers"
    order = itertools.product(range(layers), cells) if by_layer else ((i, j) for j in cells for i in range(layers))
    with _quietly(codes), _bar(progress, horizon * len(cells) * layers) as update:
        for t, (layer, cell) in itertools.product(range(context, context + horizon if batch else 0), list(order)):
            place = (slice(None), t, cell // width, cell % width, layer)
            logits = prior(clip)[place].unsqueeze(1)
            if not torch.isfinite(logits).all():
                raise ValueError(NOT_FINITE)
            times, position = clip.new_tensor([t]), clip.new_tensor([cell])
            clip[place] = choice(logits, times, position, layer).squeeze(1)
            update(1)
    return _split(clip[:, context:], num_futures)


def _check(prior: STPixelCNN, codes: Tensor) -> None:
    """Raise unless the codes are of this prior."""
    layers, size = prior.config.layers, prior.config.codebook_size
    if not isinstance(codes, Tensor) or codes.dtype != torch.int64:
        raise TypeError(f"codes must be an int64 tensor, got {getattr(codes, 'dtype', type(codes).__name__)}")
    if codes.dim() != 5 or codes.shape[-1] != layers or 0 in codes.shape[2:4]:
        raise ValueError(f"codes must be (B, T, H, W, {layers}) with a row and a column, got {tuple(codes.shape)}")
    if codes.device != prior.norm.weight.device:
        raise ValueError(f"codes are on {codes.device} and the prior on {prior.norm.weight.device}; move one of them")
    if values_can_be_read(codes) and codes.numel():
        low, high = torch.stack(torch.aminmax(codes)).tolist()
        if low < 0 or high >= size:
            raise ValueError(f"codes must lie in 0..{size - 1}, as a codebook has {size} codewords, got {low}..{high}")


def _choice(prior: STPixelCNN, temperature: float, top_k: int | None, keys: Tensor) -> Choice:
    """Raise ValueError for a temperature or ``top_k`` that cannot be."""
    size = prior.config.codebook_size
    number = as_number(temperature)
    if number is None or not 0 <= number < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature!r}")
    if top_k is None:
        return Choice(number, None, keys)
    whole = as_integer(top_k)
    if whole is None or not 1 <= whole <= size:
        raise ValueError(f"top_k must be 1 to {size}, the codewords in a codebook, or None for all, got {top_k!r}")
    return Choice(number, whole, keys)


def _futures(num_futures: int | None) -> tuple[int | None, int]:
    """``num_futures`` as it was given, and how many that is; ValueError unless it is None or a positive integer."""
    if num_futures is None:
        return None, 1
    whole = as_integer(num_futures)
    if whole is None or whole < 1:
        raise ValueError(f"num_futures must be a positive integer, or None for one future, got {num_futures!r}")
    return whole, whole


def _check_compilable(prior: STPixelCNN, codes: Tensor) -> None:
    """Raise BackendError where a trace would hold the network anew for every position."""
    conditioning = prior.config.conditioning
    if conditioning == "past_frames" or compiled.serves(prior, codes):
        return
    raise BackendError(
        "to compile or export an S-HR-VQVAE takes the sampler's compiled kernel, which serves float32 and float64 on "
        "the CPU, and bfloat16 where `vpfast doctor` shows avx512_bf16, with conditioning='raster'; "
        f"this one is {prior.norm.weight.dtype} on {codes.device} with "
        f"conditioning={conditioning!r}, under vpfast.backend({current_backend()!r}). `vpfast doctor` shows whether "
        "this installation has compiled kernels and, if not, why and how to build them"
    )


@contextmanager
def _quietly(codes: Tensor) -> Iterator[None]:
    """Without gradients, and in the type of the weights."""
    # A torch.func transform refuses tensors that were made in inference mode.
    can_be_inference = not torch.compiler.is_compiling() and not is_transformed(codes)
    without_gradients = torch.inference_mode if can_be_inference else torch.no_grad
    without_casts = torch.autocast(codes.device.type, enabled=False) if autocast_is_on(codes) else nullcontext()
    with without_gradients(), without_casts:
        yield


@contextmanager
def _bar(progress: bool, codes: int) -> Iterator[Callable[[int], object]]:
    """What is told how many codes were chosen since the last time."""
    if not progress:
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm: pip install tqdm, or pass progress=False") from error
    with tqdm(total=codes, desc="sample", unit="code", leave=False) as bar:
        yield bar.update


def _split(clips: Tensor, num_futures: int | None) -> Tensor:
    """(B F, ...) -> (B, F, ...) where futures were asked for. A tensor that autograd may keep."""
    return clips.clone() if num_futures is None else clips.unflatten(0, (-1, num_futures)).clone()
