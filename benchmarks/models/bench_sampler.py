"""Sampling of S-HR-VQVAE's codes: a forward pass for every code, the cached sampler of torch operators, vpfast's.

    python benchmarks/models/bench_sampler.py [--save]

Weights and codes are random, which costs what trained ones cost. "naive" is extrapolated: forward passes are timed on
clips that end with the frame being sampled, for several of those frames, and interpolated between; a code costs one
such pass. "eager" is the cached sampler with torch operators alone: backend "reference", and attention by
scaled_dot_product_attention on the keys so far. "vpfast" is the sampler as it is. A position's step is the time of all
frames but the first one, whose time holds the context's too, for each position in them. No figure is given when a
contender's codes are wrong: they must be the likeliest at every position of a forward pass over the whole clip.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import harness

import vpfast
from vpfast.models import SHRVQVAEConfig, STPixelCNN
from vpfast.models.shrvqvae import sample
from vpfast.ops import Mask3d

LATENT = {"mnist-3x4": (16, 16), "kth-3x8": (32, 32)}
NEAR = 1e-4
"""Logits nearer to each other than this may fall either way by rounding."""

Sampler = Callable[[int], Tensor]


def attention_on_keys_so_far(
    q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int], positions: Tensor, mask: Mask3d, scale: float | None = None
) -> Tensor:
    """masked_attention3d_decode of the mask "raster", of torch operators."""
    seen = int(positions[-1]) + 1
    visible = None if len(positions) == 1 else mask.visible(grid, positions)[:, :seen]
    return F.scaled_dot_product_attention(q, k[:, :, :seen], v[:, :, :seen], visible, scale=scale)


@contextmanager
def torch_operators() -> Iterator[None]:
    with (
        vpfast.backend("reference"),
        mock.patch("vpfast.nn.masked_attention3d.masked_attention3d_decode", attention_on_keys_so_far),
    ):
        yield


def contenders(prior: STPixelCNN, codes: Tensor) -> dict[str, Sampler]:
    def eager(horizon: int) -> Tensor:
        with torch_operators():
            return sample(prior, codes, horizon)

    return {"eager": eager, "vpfast": lambda horizon: sample(prior, codes, horizon)}


@torch.inference_mode()
def check(prior: STPixelCNN, codes: Tensor, name: str, sampled: Tensor) -> None:
    logits = prior(torch.cat((codes, sampled), 1))[:, codes.shape[1] :]
    behind = logits.amax(-1) - logits.gather(-1, sampled[..., None])[..., 0]
    if not behind.max() < NEAR:
        raise SystemExit(f"{name} is wrong: a code is {behind.max():.1e} behind the likeliest one: no figures")


@torch.inference_mode()
def naive_seconds(prior: STPixelCNN, codes: Tensor, horizon: int, calls: int) -> tuple[float, dict[int, float]]:
    """Of all forward passes, and the measured ones by the number of frames."""
    batch, context, height, width, layers = codes.shape
    measured = {}
    for length in sorted({context + 1, context + horizon, *(context + horizon * part // 3 for part in (1, 2))}):
        clip = torch.randint(prior.config.codebook_size, (batch, length, height, width, layers))
        prior(clip)
        measured[length] = statistics.median(seconds(lambda clip=clip: prior(clip)) for _ in range(calls))
    known = sorted(measured)
    total = 0.0
    for length in range(context + 1, context + horizon + 1):
        after = next(k for k in known if k >= length)
        before = max((k for k in known if k <= length), default=after)
        share = (length - before) / (after - before) if after > before else 0.0
        total += (measured[before] + share * (measured[after] - measured[before])) * height * width * layers
    return total, measured


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(preset: str, batch: int, context: int, horizon: int, rounds: int) -> list[dict]:
    torch.manual_seed(0)
    prior = STPixelCNN(SHRVQVAEConfig.preset(preset)).eval()
    config = prior.config
    codes = torch.randint(config.codebook_size, (batch, context, *LATENT[preset], config.layers))
    samplers = contenders(prior, codes)
    for name, sampler in samplers.items():
        check(prior, codes, name, sampler(horizon))

    times: dict[str, dict[int, list[float]]] = {name: {1: [], horizon: []} for name in samplers}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            for length, measured in times[name].items():
                measured.append(seconds(lambda sampler=sampler, length=length: sampler(length)))
    case = {"preset": preset, "batch": batch, "context": context, "horizon": horizon}
    total, calls = naive_seconds(prior, codes, horizon, calls=3)
    rows = [{**case, "who": "naive", "seconds": total, "forward_seconds_by_frames": calls}]
    positions = (horizon - 1) * codes[0, 0, ..., 0].numel()
    for name, measured in times.items():
        whole = statistics.median(measured[horizon])
        step = statistics.median(a - b for a, b in zip(measured[horizon], measured[1], strict=True)) / positions
        spread = [min(measured[horizon]), max(measured[horizon])]
        rows.append({**case, "who": name, "seconds": whole, "spread": spread, "position_ms": step * 1e3})
    return rows


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        same = {r["who"]: r for r in rows if all(r[k] == row[k] for k in ("preset", "batch", "context", "horizon"))}
        against_eager = same["eager"]["position_ms"] / row["position_ms"] if "position_ms" in row else None
        lines.append(
            [
                row["preset"],
                str(row["batch"]),
                f"{row['context']} -> {row['horizon']}",
                row["who"],
                f"{row['seconds']:.3f}",
                f"{row['spread'][0]:.3f}-{row['spread'][1]:.3f}" if "spread" in row else "extrapolated",
                f"{same['naive']['seconds'] / row['seconds']:.0f}x",
                f"{row['position_ms']:.4f}" if "position_ms" in row else "-",
                f"{against_eager:.1f}x" if against_eager is not None else "-",
            ]
        )
    header = ["preset", "batch", "frames", "who", "s", "least-most", "against naive", "ms a position", "against eager"]
    return harness.markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the record under benchmarks/results/")
    parser.add_argument("--presets", nargs="+", default=["mnist-3x4"], choices=LATENT, help="whose prior is sampled")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="clips at a time")
    parser.add_argument("--context", type=int, default=10, help="frames given")
    parser.add_argument("--horizon", type=int, default=10, help="frames sampled, at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="how often each contender samples")
    arguments = parser.parse_args()
    if arguments.horizon < 2:
        parser.error(f"--horizon must be at least 2 to tell a position's step, got {arguments.horizon}")

    harness.allocator("recycled")
    rows = []
    for preset in arguments.presets:
        for batch in arguments.batch:
            rows += measure(preset, batch, arguments.context, arguments.horizon, arguments.rounds)
    machine = harness.machine()
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    how = (
        "Medians over rounds in which the contenders take turns; the whole time is from the context's codes to the "
        f"last sampled one. {told}."
    )
    text = f"# Sampling S-HR-VQVAE's codes, float32\n\n{how}\n\n{table(rows)}"
    print(text)
    if arguments.save:
        harness.save("sampler_cpu", {"machine": machine, "rows": rows}, text)


if __name__ == "__main__":
    main()
