"""The demonstration: train a compact MSPN and a narrow S-HR-VQVAE on moving handwritten digits, look at what they
predict, time the kernels.

    python -m vpfast.cli.demo [--mnist FOLDER] [--out demo]

The steps are counted, not timed: a slower machine takes longer and ends at the same place.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vpfast import backend, ops
from vpfast._files import new_folder, refusal
from vpfast.cli import Parser, answered
from vpfast.ops.codeword_search import register as codeword_search
from vpfast.ops.edlstm_gates import register as edlstm_gates
from vpfast.ops.masked_attention3d import register as masked_attention3d
from vpfast.training import DataConfig, OptimConfig, TrainConfig, checkpoint, train
from vpfast.training.clips import dataset
from vpfast.training.evaluation import evaluate, shown, together
from vpfast.training.recipes import BASELINE
from vpfast.visual import side_by_side, write_gif, write_strip

CONTEXT, HORIZON = 10, 10


class Stage(NamedTuple):
    """A part of MSPN's training: so many steps of predicting ``horizon`` frames from ``context``."""

    context: int
    horizon: int
    steps: int


# What the folder holds, and all that a second run may replace.
MSPN_WEIGHTS, CODES_WEIGHTS = "weights", "weights-shrvqvae"
FILES = frozenset(
    {"metrics.md", "metrics.json", "prediction.gif", "strip.png", MSPN_WEIGHTS, CODES_WEIGHTS}
    | {f"{folder}/{name}" for folder in (MSPN_WEIGHTS, CODES_WEIGHTS) for name in checkpoint.WEIGHTS_FILES}
)
TEST_CLIPS, SHOWN_CLIP, AT_ONCE = 100, 0, 25
ATTENTION_GRID = (5, 16, 16)

NETWORK = {"preset": "compact", "channels": [16, 32], "levels": 1, "hidden_channels": 16}
# Short clips first: they teach how digits move. Then the whole way, each prediction made from the one before.
STAGES = (Stage(4, 2, steps=150), Stage(5, 5, steps=250), Stage(5, 10, steps=330))

# S-HR-VQVAE as for Moving MNIST, but narrower. Short clips: what it learns of them holds for longer ones.
CODES = {
    "name": "shrvqvae",
    "preset": "mnist-3x4",
    "channels": [16, 32],
    "residual_channels": 16,
    "prior_channels": 24,
    "prior_blocks": 2,
    "prior_heads": 3,
    "prior_head_dim": 8,
    "prior_ffn": 48,
    "prior_head": 48,
}
CODES_STAGES: dict[str, dict[str, Any]] = {
    "autoencoder": {"steps": 700, "batch_size": 8, "context": 4, "optim": {"lr": 3e-3}},
    "prior": {"steps": 1100, "context": 3, "horizon": 7, "optim": {"lr": 5e-3}},
    "joint": {"steps": 100, "context": 3, "horizon": 7, "optim": {"lr": 1e-3}},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, evaluate, draw, time; writes the folder ``--out`` and prints the tables. Returns 0."""
    options = _options(argv)
    if (reason := refusal(options.out, FILES)) is not None:
        raise FileExistsError(f"--out {options.out} {reason}")
    started = time.perf_counter()
    data = DataConfig(root=options.mnist, size=32, digit_size=20, digits=1, speed=0.05, supersample=4, clips=100_000)
    with tempfile.TemporaryDirectory() as scratch, new_folder(options.out, FILES) as folder:
        trained = {
            "MSPN": (_train_mspn(data, Path(scratch), options.scale), MSPN_WEIGHTS),
            "S-HR-VQVAE": (_train_codes(data, Path(scratch), options.scale), CODES_WEIGHTS),
        }
        clips = dataset(data, "test", CONTEXT + HORIZON, TEST_CLIPS)
        evaluations, shown_clips = {}, {"truth": clips[SHOWN_CLIP]}
        for name, (weights, kept) in trained.items():
            shutil.copytree(weights, folder / kept)
            model, _ = checkpoint.read_weights(weights, nn.Module)
            evaluations[name] = evaluate(model, clips, CONTEXT, AT_ONCE, progress=True)
            predicted = shown(model, clips[SHOWN_CLIP], CONTEXT)
            shown_clips[name] = torch.cat([clips[SHOWN_CLIP][:CONTEXT], predicted])
        evaluation = together(evaluations)
        table = evaluation.markdown(per_frame=True)
        (folder / "metrics.md").write_text(table + "\n")
        (folder / "metrics.json").write_text(json.dumps(evaluation.to_dict(), indent=2) + "\n")
        _draw(shown_clips, folder)
    print(f"\n{TEST_CLIPS} test clips of digits never trained on, {HORIZON} frames from {CONTEXT}:\n\n{table}\n")
    print("\n".join(kernel_table()))
    mse = {name: report.mean["mse"] for name, report in evaluation.reports.items()}
    told = ", ".join(f"of {name} {mse[name]:.4f}" for name in trained)
    print(f"\nMSE of the prediction {told}, of repeating the last frame {mse[BASELINE]:.4f}")
    print(f"pictures and numbers in {options.out}/, after {time.perf_counter() - started:.0f} s:")
    print("  " + "  ".join(sorted(path.name for path in options.out.iterdir())))
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m vpfast.cli.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--mnist", help="a folder with MNIST's idx files (default: the digits of scikit-learn)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="the folder to write (default: demo)")
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the usual training steps")
    options = parser.parse_args(argv)
    if not 0 < options.scale <= 1000:
        parser.error(f"--scale: {options.scale} given, must be above 0 and at most 1000")
    return options


def _train_mspn(data: DataConfig, scratch: Path, scale: float) -> Path:
    weights: Path | None = None
    for number, stage in enumerate(STAGES, 1):
        steps = _scaled(stage.steps, scale)
        print(f"training MSPN, part {number} of {len(STAGES)}: {stage.horizon} frames from {stage.context}")
        schedule: Literal["constant", "cosine"] = "cosine" if number == len(STAGES) else "constant"
        config = TrainConfig(
            out=str(scratch / f"part{number}"),
            init=None if weights is None else str(weights),
            model=NETWORK,
            data=data,
            optim=OptimConfig(lr=2e-3, schedule=schedule, warmup=min(10, steps), clip_norm=500.0),
            context=stage.context,
            horizon=stage.horizon,
            steps=steps,
            batch_size=4,
            seed=number,
            val_every=0,
            save_every=0,
        )
        weights = train(config)
    assert weights is not None
    return weights


def _train_codes(data: DataConfig, scratch: Path, scale: float) -> Path:
    print(f"training S-HR-VQVAE, {len(CODES_STAGES)} stages")
    stages: dict[str, dict[str, Any]] = {}
    for name, stage in CODES_STAGES.items():
        steps = _scaled(stage["steps"], scale)
        stages[name] = {**stage, "steps": steps, "optim": {**stage["optim"], "warmup": min(10, steps)}}
    config = TrainConfig(
        out=str(scratch / "shrvqvae"),
        model=CODES,
        stages=stages,
        data=data,
        optim=OptimConfig(schedule="cosine", clip_norm=1.0),
        batch_size=4,
        val_every=0,
        save_every=0,
    )
    return train(config)


def _scaled(steps: int, scale: float) -> int:
    return max(1, round(steps * scale))


def _draw(clips: dict[str, Tensor], folder: Path) -> None:
    """``clips``: what really happened, then the future that each model predicts."""
    write_gif(folder / "prediction.gif", side_by_side(clips, context=CONTEXT), fps=6)
    write_strip(folder / "strip.png", clips, context=CONTEXT)


def kernel_table() -> list[str]:
    """Each compiled CPU kernel against its reference: first that both agree, then how long both take."""
    for backends in (edlstm_gates.backends, codeword_search.backends, masked_attention3d.backends):
        refusal = backends.refusal("native", "cpu")
        if refusal is not None:
            return [f"no compiled kernel to compare with its reference: {refusal}"]
    lines = [
        f"Operators in float32, {torch.get_num_threads()} threads, median of 9:",
        "",
        "| | plain PyTorch | compiled kernel | times as fast | largest difference |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, work in _works().items():
        with backend("reference"):
            expected, slow = work(), _median_ms(work)
        with backend("native"):
            found, fast = work(), _median_ms(work)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        difference = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
        lines.append(f"| {name} | {slow:.1f} ms | {fast:.1f} ms | {slow / fast:.1f} | {difference:.1e} |")
    return lines


def _works() -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    gates, cell = torch.randn(8, 256, 64, 64), torch.randn(8, 64, 64, 64)
    # Eighths: distances are exact in float32, so that no rounding tells two codewords apart that are equally near.
    z, *codebooks = (torch.randn(rows, 8).mul(8).round().div(8) for rows in (65_536, 8, 8**2, 8**3))
    q, k, v = (torch.randn(1, 4, math.prod(ATTENTION_GRID), 32) for _ in range(3))
    gating, search = "edlstm_gates (8, 256, 64, 64)", "codeword_search (65536, 8), 3 layers of 8"
    attention = "masked_attention3d (1, 4, 5 x 16 x 16, 32), raster"
    return {
        f"{gating}, forward": partial(_gating, gates, cell),
        f"{gating}, forward + backward": partial(_gating_gradients, gates, cell),
        f"{search}, forward": partial(ops.codeword_search, z, codebooks),
        f"{search}, training forward + backward": partial(_search_gradients, z, codebooks),
        f"{attention}, forward": partial(_attention, q, k, v),
        f"{attention}, forward + backward": partial(_attention_gradients, q, k, v),
    }


def _gating(gates: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return ops.edlstm_gates(gates, cell)


def _gating_gradients(gates: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
    inputs = gates.detach().requires_grad_(), cell.detach().requires_grad_()
    h, c = ops.edlstm_gates(*inputs)
    return torch.autograd.grad((h.sum() + c.sum()), inputs)


def _search_gradients(z: Tensor, codebooks: list[Tensor]) -> tuple[Tensor, ...]:
    inputs = [tensor.detach().requires_grad_() for tensor in (z, *codebooks)]
    found = ops.codeword_search_train(inputs[0], inputs[1:])
    return torch.autograd.grad(found.codebook_losses.sum() + found.commitment_losses.sum(), inputs)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (ops.masked_attention3d(q, k, v, ATTENTION_GRID, ops.Mask3d("raster")),)


def _attention_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
    out = ops.masked_attention3d(q, k, v, ATTENTION_GRID, ops.Mask3d("raster"))
    return torch.autograd.grad(out.sum(), (q, k, v))


def _median_ms(work: Callable[[], object], repeats: int = 9) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


if __name__ == "__main__":
    sys.exit(answered(main, "python -m vpfast.cli.demo"))
