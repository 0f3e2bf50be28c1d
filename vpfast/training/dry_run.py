"""What a run would be: its parameters, its memory and its arithmetic, from one step on tensors without data."""

import dataclasses
import importlib
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vpfast.training.config import TrainConfig
from vpfast.training.engine import accelerator, freeze_all_but
from vpfast.training.network import build_model, recipe_for
from vpfast.training.stages import runs_of
from vpfast.training.update import Context, Update

# The operators that torch knows no formula for.
_FORMULAS = ("vpfast.ops.masked_attention3d.flops", "vpfast.ops.codeword_search.flops")


class Cost(NamedTuple):
    """What one step of a run takes in one process.

    ``parameters``: trained and frozen ones of every network. Bytes: ``weights``, buffers included; ``gradients``;
    ``optimizer``, its states, averaged weights included; ``activations``, what else is alive when most is; ``peak``,
    all that is alive then. ``flops``: of convolutions, matrix products, attention and codeword search.
    """

    parameters: dict[str, tuple[int, int]]
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    flops: int


def dry_run(config: TrainConfig) -> dict[str, tuple[TrainConfig, Cost]]:
    """What each stage of the run takes, by its name; "" for a run in one go. Reads no data and writes nothing.

    The step is the run's own, on tensors that have shapes and no values: where a network looks at a value it finds a 1.
    For adversarial training it is the generator's.

    Raises:
        ValueError: the configuration does not allow this run; names the key. Or there are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("--dry-run: started in several processes, must be started in one")
    runs = runs_of(config) or {"": config}
    return {stage: (each, cost(each)) for stage, each in runs.items()}


def cost(config: TrainConfig) -> Cost:
    """That of one run, as :func:`dry_run` tells of each stage."""
    for module in _FORMULAS:
        importlib.import_module(module)
    config = _measurable(config)
    prepared = accelerator(config)
    prepared.device_placement = False  # a parameter without values cannot be moved, and need not be
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Ones())  # type: ignore[no-untyped-call]
        memory = stack.enter_context(_Memory())
        recipe, model = recipe_for(config), build_model(config)
        trained = recipe.trained(model)
        freeze_all_but(trained, model)
        update = recipe.update(Context(model, trained, config, prepared, recipe))
        networks = {"model": model, **update.modules}
        stack.enter_context(memory.of_backward(networks, update.optimizers))
        frames = torch.empty(
            config.batch_size * config.optim.accumulate,
            config.clip_length,
            config.data.channels,
            *config.data.frame_size,
        )
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _OneModule()  # type: ignore[assignment]
        with counter:
            update(frames, 0)
        return _cost(config, model, update, memory, int(counter.get_total_flops()))


def _measurable(config: TrainConfig) -> TrainConfig:
    """The same run as far as sizes go, on the CPU, where float16 cannot be trained in and bfloat16 is as large."""
    precision = "bf16" if config.precision == "fp16" else config.precision
    model = config.model | ({"joint_inputs": "teacher"} if config.model.get("joint_inputs") == "free" else {})
    return dataclasses.replace(config, device="cpu", precision=precision, model=model, channels_last=False)


def _cost(config: TrainConfig, model: nn.Module, update: Update, memory: "_Memory", flops: int) -> Cost:
    networks = {"model": model, **update.modules}
    moved = {id(p): p for optimizer in update.optimizers.values() for g in optimizer.param_groups for p in g["params"]}
    gradients = sum(map(_bytes, moved.values()))
    weights = sum(
        sum(map(_bytes, {id(each): each for each in (*network.parameters(), *network.buffers())}.values()))
        for network in networks.values()
    )
    averages = 0 if config.optim.ema_decay is None else 1
    states = (2 + averages) * gradients
    counted = {
        name: (
            sum(p.numel() for p in network.parameters() if id(p) in moved),
            sum(p.numel() for p in network.parameters() if id(p) not in moved),
        )
        for name, network in _named(model, update.modules).items()
    }
    activations = max(0, memory.peak - weights - memory.gradients_at_peak)
    return Cost(counted, weights, gradients, states, activations, memory.peak + states, flops)


def _named(model: nn.Module, others: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts that a run may train apart from each other."""
    children = dict(model.named_children())
    if "autoencoder" in children:
        inside = {f"autoencoder.{name}": part for name, part in children.pop("autoencoder").named_children()}
        own = {**inside, **children}
    else:
        own = children if "quantizer" in children else {type(model).__name__: model}
    return {**own, **{name: part for name, part in others.items() if any(True for _ in part.parameters())}}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Ones(TorchDispatchMode):
    """Where Python asks a tensor without data for its value it is told 1, or True."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class _OneModule:
    """Says that no module is entered: the counter's own tracker keeps what activation checkpointing lets go."""

    parents = frozenset({"Global"})

    def __enter__(self) -> "_OneModule":
        return self

    def __exit__(self, *error: object) -> None:
        return None


class _Memory(TorchDispatchMode):
    """How many bytes the results of operators hold, and how many at most: ``peak``, until the first optimizer moves.

    ``gradients_at_peak``: those of them that are gradients of weights.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.gradients_at_peak = 0
        self._alive = self._gradients = 0
        self._known: set[int] = set()
        self._over = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        if self._alive > self.peak and not self._over:
            self.peak, self.gradients_at_peak = self._alive, self._gradients
        return result

    def _hold(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self._alive += storage.nbytes()
            weakref.finalize(storage, self._let_go, key, storage.nbytes())

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size

    @contextmanager
    def of_backward(self, networks: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> Iterator[None]:
        """Watch the gradients of a step as they come; the states that an optimizer makes are counted apart."""
        parameters = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
        plain = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers.values()]
        hooks = [p.register_post_accumulate_grad_hook(self._count) for p in parameters]
        hooks += [optimizer.register_step_pre_hook(self._end) for optimizer in plain]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, parameter: Tensor) -> None:
        if id(parameter) not in self._known:
            self._known.add(id(parameter))
            self._gradients += _bytes(parameter)

    def _end(self, *call: Any) -> None:
        self._over = True


def report(costs: Mapping[str, tuple[TrainConfig, Cost]]) -> str:
    """What :func:`dry_run` found, for people."""
    blocks = []
    for stage, (run, found) in costs.items():
        height, width = run.data.frame_size
        clips = run.batch_size * run.optim.accumulate
        title = f"stage {stage}" if stage else f"model {run.model.get('name', 'mspn')}"
        lines = [
            f"{title}: {run.steps} steps of {clips} clips (T, C, H, W) = ({run.clip_length}, {run.data.channels}, "
        ]
        lines[0] += f"{height}, {width}), {run.precision}"
        rows = [("", "trained", "frozen")]
        rows += [(name, f"{moved:,}", f"{kept:,}") for name, (moved, kept) in found.parameters.items()]
        sums = [sum(column) for column in zip(*found.parameters.values(), strict=True)]
        rows.append(("parameters in all", f"{sums[0]:,}", f"{sums[1]:,}"))
        lines += [f"  {name:<24}{moved:>14}{kept:>14}" for name, moved, kept in rows]
        for name in ("weights", "gradients", "optimizer", "activations", "peak"):
            lines.append(f"  {name:<24}{megabytes(getattr(found, name)):>14}")
        lines.append(f"  {'FLOPs a step':<24}{found.flops / 1e9:>10,.2f} G")
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, NOTE])


NOTE = (
    "Estimated for one process, from one step on tensors without values: no data was read, nothing written.\n"
    "Memory: peak is weights, optimizer states and activations; gradients take the activations' place as the backward\n"
    "pass goes; what the allocator and libraries need comes on top. Adversarial training: the generator's step.\n"
    "FLOPs: convolutions, matrix products, attention and codeword search, forward and backward; the codes that\n"
    "model.joint_inputs 'free' has chosen come on top."
)


def megabytes(size: int) -> str:
    """Bytes in MB, of 10^6."""
    return f"{size / 1e6:,.1f} MB"
