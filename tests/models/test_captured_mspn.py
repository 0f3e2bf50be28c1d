"""MSPN as it is recorded on a GPU, with a tape in the place of CUDA graphs."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tape import TapeRecorder
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vpfast
from vpfast.models import MSPN, MSPNConfig
from vpfast.models.mspn.captured import CapturedMSPN, optimize_mspn, prepared
from vpfast.nn.bottleneck import Bottleneck

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one level": {"levels": 1},
    "three levels": {"channels": (4, 6, 8, 8), "levels": 3, "widen": "after_pool"},
    "without enc_info": {"enc_info": False},
    "enc_lstm_dec": {"recurrence": "enc_lstm_dec"},
    "feed_frame": {"feed_frame": True, "in_channels": 3},
    "average": {"down_sampling": "average"},
    "batch norm": {"batch_norm": True},
}
MODULE = "vpfast.models.mspn.captured"
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())


def tiny(**changes: Any) -> MSPN:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"in_channels": 1, "channels": (4, 6, 8), "levels": 2, "hidden_channels": 4}
    model = MSPN(MSPNConfig(**{**fields, **changes}))
    if model.config.batch_norm:
        for _ in range(3):  # running statistics that are not those it starts with
            model(torch.rand(4, 3, model.config.in_channels, 16, 24))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


def clip(model: MSPN, batch: int = 2, time: int = 3, seed: int = 1) -> Tensor:
    return torch.rand(batch, time, model.config.in_channels, 8, 16, generator=torch.Generator().manual_seed(seed))


def captured(model: MSPN, dtype: torch.dtype | None = None, **options: Any) -> tuple[CapturedMSPN, TapeRecorder]:
    recorder = TapeRecorder()
    return CapturedMSPN(model, dtype, recorder, **options), recorder


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@every_variant
def test_a_clip(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    fast, recorder = captured(model)
    for seed in (1, 2, 3):
        frames = clip(model, seed=seed)
        close(fast.predict(frames, 4), model.predict(frames, 4))
    assert (recorder.captures, recorder.replays) == (1, 3)


@every_variant
def test_frame_by_frame(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    fast, recorder = captured(model)
    frames = clip(model)
    plain, stream = vpfast.Stream(model), vpfast.Stream(fast)
    for time in range(frames.shape[1]):
        close(stream.push(frames[:, time]), plain.push(frames[:, time]))
    wanted, captures = model.predict(frames, 3), recorder.captures
    for _ in range(2):  # a rollout moves nothing
        close(stream.rollout(3), wanted)
        close(stream.rollout(1), wanted[:, :1])
    assert recorder.captures == captures + 1
    state = fast.init_state(2, 8, 16)
    for time in range(frames.shape[1]):
        _, state = fast.step(frames[:, time], state)
    close(fast.rollout(state, 3), wanted)
    for time in range(3):
        prediction, state = fast.step(None, state)
        close(prediction, wanted[:, time])


@every_variant
@pytest.mark.parametrize("batch", [1, 5])
def test_clips_do_not_depend_on_those_beside_them(changes: dict[str, Any], batch: int) -> None:
    """So that a batch can be filled up; the clips that fill it are zeros, and another batch came before."""
    model = tiny(**changes)
    fast, _ = captured(model)
    fast.predict(clip(model, 8, seed=5), 2)
    frames = clip(model, batch)
    alone = torch.cat([model.predict(frames[k : k + 1], 2) for k in range(batch)])
    close(fast.predict(frames, 2), alone)


def test_what_is_recorded_serves_no_other_length_horizon_or_size() -> None:
    model = tiny()
    fast, recorder = captured(model)
    frames = torch.rand(1, 4, 1, 16, 16)
    for part, horizon in [(frames, 2), (frames, 3), (frames[:, :3], 2), (frames[..., :8, :], 2), (frames[..., :8], 2)]:
        close(fast.predict(part, horizon), model.predict(part, horizon))
    assert recorder.captures == 5


def test_frames_of_another_layout_and_with_gradients() -> None:
    model = tiny(in_channels=3)
    fast, recorder = captured(model)
    frames = clip(model)
    wanted = model.predict(frames, 2)
    close(fast.predict(frames.movedim(2, -1).contiguous().movedim(-1, 2), 2), wanted)
    close(fast.predict(frames[:1].expand(2, -1, -1, -1, -1), 2), wanted[:1].expand(2, -1, -1, -1, -1))
    found = fast.predict(frames.clone().requires_grad_(), 2)
    close(found, wanted)
    assert not found.requires_grad
    assert found.is_contiguous()
    assert recorder.captures == 1


def test_half_precision_keeps_the_type_of_the_model() -> None:
    model = tiny()
    fast, _ = captured(model, torch.bfloat16)
    frames = clip(model)
    found = fast.predict(frames, 3)
    assert found.dtype == torch.float32
    close(found, model.predict(frames, 3), 0.02)
    assert not torch.equal(found, model.predict(frames, 3))
    stream = vpfast.Stream(fast)
    for time in range(3):
        pushed = stream.push(frames[:, time])
    assert pushed.dtype == torch.float32
    close(stream.rollout(3), found)
    state = fast.init_state(1, 8, 16)
    assert {part.dtype for cell in state.cells for part in cell} == {torch.bfloat16, torch.float32}  # h, and c


def test_under_autocast_nothing_changes() -> None:
    model = tiny()
    fast, _ = captured(model)
    frames = clip(model)
    wanted = fast.predict(frames, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast.predict(frames, 2), wanted)


def test_the_model_and_what_it_was_given_stay_as_they_are() -> None:
    model = tiny(batch_norm=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fast, _ = captured(model)
    frames = clip(model)
    wanted = fast.predict(frames, 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(fast.predict(frames, 2), wanted)


def test_a_state_stays_as_it_is() -> None:
    model = tiny(feed_frame=True)
    fast, _ = captured(model)
    frames = clip(model)
    _, state = fast.step(frames[:, 0], fast.init_state(2, 8, 16))
    kept = [tensor.clone() for tensor in tree_leaves(state) if isinstance(tensor, Tensor)]
    ahead, _ = fast.peek(state)
    for time in (1, 2):
        fast.step(frames[:, time], fast.step(None, state)[1])
    assert all(map(torch.equal, kept, [tensor for tensor in tree_leaves(state) if isinstance(tensor, Tensor)]))
    assert torch.equal(fast.peek(state)[0], ahead)


def test_without_clips_or_horizon_nothing_is_recorded() -> None:
    model = tiny()
    fast, recorder = captured(model)
    assert fast.predict(clip(model, batch=0), 2).shape == (0, 2, 1, 8, 16)
    assert fast.predict(clip(model), 0).shape == (2, 0, 1, 8, 16)
    assert fast.step(None, fast.init_state(0, 8, 16))[0].shape == (0, 1, 8, 16)
    assert fast.rollout(fast.init_state(0, 8, 16), 3).shape == (0, 3, 1, 8, 16)
    assert recorder.captures == 0


@pytest.mark.parametrize(
    ("frames", "horizon", "said"),
    [
        (torch.rand(1, 2, 1, 8, 16) * 255, 1, "reach from"),
        (torch.full((1, 2, 1, 8, 16), float("nan")), 1, "must be finite"),
        (torch.rand(1, 2, 3, 8, 16), 1, "3 channels"),
        (torch.rand(1, 2, 1, 9, 16), 1, "9 is not a multiple of 4"),
        (torch.rand(1, 0, 1, 8, 16), 1, "T = 0"),
        (torch.rand(1, 2, 1, 8, 16), -1, "horizon"),
    ],
)
def test_refusals(frames: Tensor, horizon: int, said: str) -> None:
    fast, recorder = captured(tiny())
    with pytest.raises(ValueError, match=said):
        fast.predict(frames, horizon)
    assert recorder.captures == 0


def test_refusals_of_a_step() -> None:
    fast, recorder = captured(tiny())
    with pytest.raises(ValueError, match=r"made for frames of shape \(2, 1, 8, 16\)"):
        fast.step(torch.rand(1, 1, 8, 16), fast.init_state(2, 8, 16))
    with pytest.raises(ValueError, match="count"):
        fast.rollout(fast.init_state(2, 8, 16), 0)
    with pytest.raises(TypeError, match="float64"):
        fast.step(torch.rand(2, 1, 8, 16).double(), fast.init_state(2, 8, 16))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        optimize_mspn(tiny(batch_norm=True).train(), None)
    model = tiny(batch_norm=True)
    model.levels[0].cell.decoder.stages[0].before.body[1].train()
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        optimize_mspn(model, None)
    assert recorder.captures == 0


def test_optimize_records_what_is_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MSPN, "_weight", property(lambda model: SimpleNamespace(is_cuda=True)))
    monkeypatch.setattr(sys.modules[MODULE], "optimize_mspn", lambda model, dtype: ("recorded", dtype))
    assert vpfast.optimize(tiny(), torch.bfloat16) == ("recorded", torch.bfloat16)


def test_a_prepared_network_has_no_norms_and_one_bias_a_sum() -> None:
    model = tiny(batch_norm=True)
    network = prepared(model, torch.float32)
    assert not [module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    blocks = [module for module in network.modules() if isinstance(module, Bottleneck)]
    assert blocks
    assert all(block.skip[0].bias is None for block in blocks)
    assert network._weight.is_contiguous(memory_format=torch.channels_last)
    close(network.predict(clip(model), 2), model.predict(clip(model), 2))


@every_variant
@torch.no_grad()
def test_what_steps_and_peeks_are_given_and_give_is_no_part_of_a_state(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    fast, _ = captured(model)
    frame = clip(model)[:, 0]
    _, state = fast.step(frame, fast.init_state(*frame.shape[:1], *frame.shape[2:]))
    frame.fill_(0.5)
    seen, ahead = fast.peek(state)
    wanted = [seen.clone(), fast.rollout(ahead, 3)]
    seen.mul_(0)
    fast.step(None, ahead)[0].mul_(0)
    close(fast.peek(ahead)[0], wanted[0])
    close(fast.rollout(ahead, 3), wanted[1])
    close(seen + wanted[0], model.step(None, model.step(clip(model)[:, 0], model.init_state(2, 8, 16))[1])[0])


# --- models that are no longer what MSPN made -------------------------------------------------------------------------


def pruned(model: MSPN) -> None:
    for layer in convolutions(model):
        prune.l1_unstructured(layer, "weight", 0.3)
    model(clip(model)).predictions[0].sum().backward()


def normed(model: MSPN) -> None:
    for layer in convolutions(model):
        parametrizations.weight_norm(layer)


def synchronized(model: MSPN) -> None:
    model.levels = nn.SyncBatchNorm.convert_sync_batchnorm(model.levels)


def normed_without_weights(model: MSPN) -> None:
    for block in (part for part in model.modules() if isinstance(part, Bottleneck)):
        for layers in (block.body, block.skip):
            norm = nn.BatchNorm2d(layers[0].out_channels, affine=False, eps=0.1)
            norm.running_mean.fill_(0.1)
            layers[1] = norm


def convolutions(model: MSPN) -> list[nn.Conv2d]:
    return [part for part in model.modules() if isinstance(part, nn.Conv2d)]


OPTIMIZERS = {"recorded": lambda model: captured(model)[0], "here": vpfast.optimize}


@pytest.mark.parametrize(
    ("change", "batch_norm"),
    [
        (pruned, False),
        (pruned, True),
        (normed, False),
        (normed, True),
        (synchronized, True),
        (normed_without_weights, True),
    ],
)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_changed_model_predicts_as_it_does(make: Any, change: Any, batch_norm: bool) -> None:
    model = tiny(batch_norm=batch_norm)
    before = model.predict(clip(model), 2)
    change(model)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    close(make(model).predict(clip(model), 2), model.predict(clip(model), 2))
    assert not torch.allclose(model.predict(clip(model), 2), before)


def replaced(model: MSPN) -> None:
    block = model.levels[0].cell.encoder.stages[0].before
    block.body[1] = nn.GroupNorm(1, block.body[0].out_channels)


def activated_otherwise(model: MSPN) -> None:
    model.levels[1].cell.decoder.stages[0].after.body[2] = nn.LeakyReLU(0.2)


def without_statistics(model: MSPN) -> None:
    model.levels[0].cell.encoder.stages[0].after.skip[1] = nn.BatchNorm2d(8, track_running_stats=False).eval()


def hooked(model: MSPN) -> None:
    model.levels[0].head.register_forward_hook(lambda part, given, made: made * 0)


def patched(model: MSPN) -> None:
    model.levels[0].head.forward = lambda x: x


def subclassed(model: MSPN) -> None:
    model.__class__ = type("Clamped", (MSPN,), {"predict": lambda self, *given: MSPN.predict(self, *given).clamp(0, 1)})


REFUSED = {
    replaced: r"'levels.0.cell.encoder.stages.0.before.body.1' is GroupNorm\(.*in place of BatchNorm2d",
    activated_otherwise: r"body.2' is LeakyReLU\(negative_slope=0.2\) in place of LeakyReLU\(negative_slope=0.01\)",
    without_statistics: r"after.skip.1' is BatchNorm2d\(8,.*track_running_stats=False\) in place of",
    hooked: "optimize does not call hooks, and 'levels.0.head' has some",
    patched: "does not call the `forward` that was set on 'levels.0.head'",
    subclassed: "optimize does what MSPN does, and Clamped.predict is another",
}


@pytest.mark.parametrize(("change", "message"), REFUSED.items())
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_what_optimize_would_not_do_is_refused(make: Any, change: Any, message: str) -> None:
    model = tiny(batch_norm=True)
    change(model)
    with pytest.raises(TypeError, match=message):
        make(model)


def test_a_subclass_that_predicts_as_ever_is_taken() -> None:
    model = tiny()
    expected = vpfast.optimize(model).predict(clip(model), 2)
    model.__class__ = type("Named", (MSPN,), {"training_step": lambda self: None})
    assert torch.equal(vpfast.optimize(model).predict(clip(model), 2), expected)


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would launch: an operator is one, a convolution with a bias two."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not (func.is_view or name.startswith(("empty", "new_empty", "detach"))):
            self.count += 2 if name == "convolution" and args[2] is not None else 1
        return func(*args, **(kwargs or {}))

    def fused(self, function: Any) -> Any:
        """``function`` as one kernel."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = self.count
            result = function(*args, **kwargs)
            self.count = before + 1
            return result

        return call


def test_a_step_takes_few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network of the widths of released-mnist, narrower: what the notes say of it."""
    model = tiny(channels=(4, 6, 8, 8), levels=3)
    fast, _ = captured(model)
    state, frame = fast.init_state(1, 8, 16), torch.rand(1, 1, 8, 16)
    with torch.no_grad(), Launches() as plain:
        model._step(frame, state, "attached")
    with torch.no_grad(), Launches() as few:
        for name in ("leaky_sum_", "signed_errors"):
            monkeypatch.setattr(f"{MODULE}.{name}", few.fused(getattr(sys.modules[MODULE], name)))
        fast._looked_at(fast._ahead(state, fast._lanes), frame, fast._lanes)
    assert (plain.count, few.count) == (304, 179)


# --- levels beside each other -----------------------------------------------------------------------------------------


class Race(Exception):  # noqa: N818 - what is looked for
    """A tensor is read that need not be written yet."""


class CheckedLanes(TorchDispatchMode):
    """Lanes, each with a clock: at each operator, whether what it reads was written before on any machine.

    ``longest``: of the chains of operators that follow from each other, as a GPU of endless width would work.
    """

    MAIN = -1

    def __init__(self) -> None:
        super().__init__()
        self.lane_now = self.MAIN
        self.seen: dict[int, dict[int, int]] = {}
        self.written: dict[int, tuple[int, int]] = {}
        self.depth: dict[int, int] = {}
        self.total = 0
        self.kept: list[Tensor | None] = []
        self.alive: list[Any] = []  # else memory, by which tensors are told apart, would be another's

    def clock(self, lane: int) -> dict[int, int]:
        return self.seen.setdefault(lane, {lane: 0})

    def wait(self, lane: int, other: int) -> None:
        mine, theirs = self.clock(lane), self.clock(other)
        for each, count in theirs.items():
            mine[each] = max(mine.get(each, 0), count)
        self.depth[lane] = max(self.depth.get(lane, 0), self.depth.get(other, 0))

    @contextmanager
    def forked(self) -> Iterator[None]:
        yield
        for lane in [lane for lane in self.seen if lane != self.MAIN]:
            self.wait(self.MAIN, lane)

    @contextmanager
    def lane(self, index: int, after: Sequence[int] = ()) -> Iterator[None]:
        if index not in self.seen:
            self.wait(index, self.MAIN)
        for other in after:
            self.wait(index, other)
        before, self.lane_now = self.lane_now, index
        yield
        self.lane_now = before

    def keep(self, *tensors: Tensor | None) -> None:
        self.kept += tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lane = self.lane_now
        clock = self.clock(lane)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and (at := tensor.untyped_storage().data_ptr()) in self.written:
                writer, count = self.written[at]
                if clock.get(writer, 0) < count:
                    raise Race(f"{func} in lane {lane} reads what lane {writer} writes beside it")
                if writer not in (lane, self.MAIN) and lane != self.MAIN and not self.is_kept(at):
                    raise Race(f"{func} in lane {lane} reads memory of lane {writer} that may be used again")
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            clock[lane] += 1
            self.total += 1
            self.depth[lane] = self.depth.get(lane, 0) + 1
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.alive.append(tensor)
                    self.written[tensor.untyped_storage().data_ptr()] = (lane, clock[lane])
        return result

    def is_kept(self, storage: int) -> bool:
        return any(tensor is not None and tensor.untyped_storage().data_ptr() == storage for tensor in self.kept)


def in_lanes(model: MSPN, frames: Tensor, horizon: int) -> tuple[Tensor, CheckedLanes]:
    lanes = CheckedLanes()
    fast, _ = captured(model, lanes=lanes)
    with torch.no_grad(), lanes:
        found = fast._future(frames, horizon)
    return found, lanes


@every_variant
def test_levels_beside_each_other_read_what_is_written(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    found, _ = in_lanes(model, clip(model), 3)
    close(found, model.predict(clip(model), 3))
    lanes = CheckedLanes()
    fast, _ = captured(model, lanes=lanes)
    ahead = fast._ahead(fast.init_state(2, 8, 16), fast._lanes)
    with torch.no_grad(), lanes:
        fast._rolled_out(fast._flat(ahead), 3)


def test_levels_overlap_while_real_frames_last() -> None:
    """With three levels the coarsest goes on beside the finest of the step before."""
    model = tiny(channels=(4, 6, 8, 8), levels=3)
    longest = {}
    for length, horizon in itertools.product((2, 6), (1, 5)):
        _, lanes = in_lanes(model, clip(model, time=length), horizon)
        longest[length, horizon] = (lanes.depth[CheckedLanes.MAIN], lanes.total)
    real = [after - before for after, before in zip(longest[6, 1], longest[2, 1], strict=True)]
    fed_back = [after - before for after, before in zip(longest[2, 5], longest[2, 1], strict=True)]
    assert real[0] < 0.92 * real[1]
    assert fed_back[0] > 0.92 * fed_back[1]  # but for a few errors


def test_the_check_of_lanes_finds_races(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(channels=(4, 6, 8, 8), levels=3)
    lane = CheckedLanes.lane
    monkeypatch.setattr(CheckedLanes, "lane", lambda self, index, after=(): lane(self, index, list(after)[1:]))
    with pytest.raises(Race, match="writes beside it"):
        in_lanes(model, clip(model), 1)
    monkeypatch.undo()
    monkeypatch.setattr(CheckedLanes, "keep", lambda self, *tensors: None)
    with pytest.raises(Race, match="may be used again"):
        in_lanes(model, clip(model), 1)
