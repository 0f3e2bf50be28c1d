"""edlstm_gates against eager PyTorch and torch.compile of the same formula.

    python benchmarks/ops/bench_edlstm_gates.py [--save] [--device cuda]

Bytes a cell element, s bytes each: forward 7 s (4 gates and c read, h and c written), backward 12 s. The share of the
copy rate is against a clone that moves as many bytes in the same run. Output allocation is part of every figure, once
with memory that is recycled and once with memory fresh from the system. No figure is given when a contender's result is
wrong.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import gpu
import harness

from vpfast.ops import current_backend, edlstm_gates
from vpfast.ops._library import operator
from vpfast.ops.edlstm_gates import reference
from vpfast.ops.edlstm_gates.register import backends

SHAPES = {
    "MSPN level 0, batch 8, 64x64": (8, 256, 64, 64),
    "MSPN level 0, batch 1, 128x128": (1, 256, 128, 128),
    "MSPN level 2, batch 8, 16x16": (8, 256, 16, 16),
}
BYTES = {"forward": 7, "forward + backward": 7 + 12}

Gating = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def forward_and_backward(gating: Gating, gates: torch.Tensor, c_prev: torch.Tensor, grads: tuple) -> tuple:
    h, c = gating(gates, c_prev)
    return torch.autograd.grad((h, c), (gates, c_prev), grads)


def check(contenders: dict[str, Gating], gates: torch.Tensor, c_prev: torch.Tensor, grads: tuple) -> None:
    """Every contender's outputs and gradients against the reference in float64."""
    exact_in = [t.detach().double().requires_grad_() for t in (gates, c_prev)]
    exact = reference.edlstm_gates(*exact_in)
    exact_grads = torch.autograd.grad(exact, exact_in, [g.double() for g in grads])
    for name, gating in contenders.items():
        found = gating(gates, c_prev)
        found_grads = torch.autograd.grad(found, (gates, c_prev), grads)
        for got, want in zip((*found, *found_grads), (*exact, *exact_grads), strict=True):
            error = ((got.double() - want).norm() / want.norm()).item()
            limit = 4 * torch.finfo(gates.dtype).eps
            if not error < limit:
                raise SystemExit(f"{name} is wrong (relative error {error:.1e}, limit {limit:.1e}): no figures")


def measure(title: str, shape: tuple[int, ...], layout: str, memory: str, seconds: float) -> list[dict]:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    batch, channels, *size = shape
    gates = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    c_prev = torch.randn(batch, channels // 4, *size).to(memory_format=memory_format).requires_grad_()
    grads = (torch.randn_like(c_prev), torch.randn_like(c_prev))

    torch.compiler.reset()
    contenders: dict[str, Gating] = {
        "vpfast": edlstm_gates,
        "torch.compile": torch.compile(reference.edlstm_gates),
        "eager": reference.edlstm_gates,
    }
    check(contenders, gates, c_prev, grads)

    rows = []
    for phase, elements in BYTES.items():
        moved = elements * c_prev.numel() * c_prev.element_size()
        source = torch.randn(moved // 8)
        calls: dict[str, Callable[[], object]] = {"copy": source.clone}
        for name, gating in contenders.items():
            if phase == "forward":
                calls[name] = lambda gating=gating: gating(gates.detach(), c_prev.detach())
            else:
                calls[name] = lambda gating=gating: forward_and_backward(gating, gates, c_prev, grads)
        for name, timing in harness.time_side_by_side(calls, seconds).items():
            case = {"case": title, "layout": layout, "memory": memory, "phase": phase}
            rows.append({**case, "who": name, "bytes": moved, **vars(timing)})
    return rows


def table(rows: list[dict]) -> str:
    def find(row: dict, who: str, what: str = "p50") -> float:
        same = [r for r in rows if all(r[k] == row[k] for k in ("case", "layout", "memory", "phase"))]
        return next(r[what] for r in same if r["who"] == who)

    def after_other_work(row: dict, who: str) -> str:
        return f"{find(row, who, 'cold'):.2f} ({find(row, who, 'cold') / row['cold']:.1f}x)"

    lines = []
    for row in rows:
        if row["who"] != "vpfast":
            continue
        own = row["p50"]
        lines.append(
            [
                row["case"],
                row["layout"],
                row["memory"],
                row["phase"],
                f"{own:.2f}",
                f"{row['p20']:.2f}-{row['p80']:.2f}",
                f"{row['bytes'] / own / 1e6:.1f}",
                f"{find(row, 'copy') / own:.0%}",
                f"{find(row, 'torch.compile'):.2f} ({find(row, 'torch.compile') / own:.1f}x)",
                f"{find(row, 'eager'):.2f} ({find(row, 'eager') / own:.1f}x)",
                f"{row['cold']:.2f}",
                after_other_work(row, "torch.compile"),
                after_other_work(row, "eager"),
            ]
        )
    header = [
        "case",
        "layout",
        "memory",
        "phase",
        "vpfast ms",
        "p20-p80",
        "GB/s",
        "of copy",
        "torch.compile ms",
        "eager ms",
        "cold: vpfast ms",
        "torch.compile ms",
        "eager ms",
    ]
    return harness.markdown_table(header, lines)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

GPU_SHAPES = {"MSPN level 0, batch 32, 64x64": (32, 256, 64, 64), "MSPN level 2, batch 8, 16x16": (8, 256, 16, 16)}
GPU_BYTES = {"forward": 7, "backward": 12, "forward + backward": 7 + 12}
LARGE = 100e6  # bytes moved, from which on the copy rate is to be reached


def backward_alone(grads: tuple, gates: torch.Tensor, c_prev: torch.Tensor) -> tuple:
    return operator("edlstm_gates_backward", current_backend())(*grads, gates, c_prev, "fiog")


def gpu_contenders(phase: str, compiled: bool, gates: torch.Tensor, c_prev: torch.Tensor, grads: tuple) -> dict:
    """Each returns the outputs, the gradients, or the gradients after a forward pass."""
    device, inputs = gates.device.type, (gates.detach(), c_prev.detach())
    if phase == "backward":
        calls = gpu.by_backend(backends, device, lambda: backward_alone(grads, *inputs))
        plain = {"eager": reference.edlstm_gates_backward}
        if compiled:
            plain["torch.compile"] = torch.compile(reference.edlstm_gates_backward)
        return calls | {name: lambda f=f: f(*grads, *inputs) for name, f in plain.items()}
    plain = {"eager": reference.edlstm_gates}
    if compiled:
        plain["torch.compile"] = torch.compile(reference.edlstm_gates)
    if phase == "forward":
        calls = gpu.by_backend(backends, device, lambda: edlstm_gates(*inputs))
        return calls | {name: lambda f=f: f(*inputs) for name, f in plain.items()}
    calls = gpu.by_backend(backends, device, lambda: forward_and_backward(edlstm_gates, gates, c_prev, grads))
    return calls | {name: lambda f=f: forward_and_backward(f, gates, c_prev, grads) for name, f in plain.items()}


def measure_on_gpu(shape: tuple[int, ...], title: str, dtype: torch.dtype, layout: str, device: str) -> tuple:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    batch, channels, *size = shape
    cell = (batch, channels // 4, *size)
    drawn = [torch.randn(s, device=device, dtype=dtype) for s in (shape, cell, cell, cell)]
    gates, c_prev, *grads = (tensor.contiguous(memory_format=memory_format) for tensor in drawn)
    exact_in = [t.double().requires_grad_() for t in (gates, c_prev)]
    exact = reference.edlstm_gates(*exact_in)
    exact_grads = torch.autograd.grad(exact, exact_in, [g.double() for g in grads])
    limit = 4 * torch.finfo(dtype).eps

    def check(name: str, found: tuple) -> None:
        error = max(map(gpu.relative_error, found, exact if phase == "forward" else exact_grads))
        if not error < limit:
            raise SystemExit(f"{phase}: {name} is wrong (relative error {error:.1e}, limit {limit:.1e}): no figures")

    rows, bars, refused = [], [], []
    for phase, elements in GPU_BYTES.items():
        moved = elements * c_prev.numel() * c_prev.element_size()
        case = f"{title}, {str(dtype).removeprefix('torch.')}, {layout}, {phase}"
        torch.compiler.reset()
        calls = gpu_contenders(
            phase, layout == "contiguous", gates.requires_grad_(), c_prev.requires_grad_(), tuple(grads)
        )
        running, why_not = gpu.checked(calls, check)
        timings = gpu.time_calls({"copy": gpu.copying(moved, device), **running}, device)
        found = gpu.rows_of(case, timings, bytes=moved)
        rows, refused = rows + found, refused + why_not
        if moved > LARGE and phase != "forward + backward":
            share = gpu.ratio(gpu.median(found, case, "copy"), gpu.median(found, case, "vpfast"))
            bars.append(gpu.Bar(f"{case}, of the copy rate", share, 0.9, ""))
    return rows, bars, refused


def on_gpu(options: argparse.Namespace) -> None:
    device = gpu.device_of(options)
    rows, bars, refused = [], [], []
    for title, shape in GPU_SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                size = (1, 16, 8, 8) if options.rehearse else shape
                found = measure_on_gpu(size, title, dtype, layout, device)
                rows, bars, refused = rows + found[0], bars + found[1], refused + found[2]
    gpu.report("edlstm_gates", rows, bars, refused, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the record under benchmarks/results/")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each comparison")
    gpu.add_options(parser)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    if arguments.device == "cuda":
        on_gpu(arguments)
        return
    rows = []
    for memory in ("fresh", "recycled"):  # in this order: what was kept once is not given back
        harness.allocator(memory)
        for title, shape in SHAPES.items():
            for layout in ("contiguous", "channels_last"):
                rows += measure(title, shape, layout, memory, arguments.seconds)
    machine = harness.machine()
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    how = (
        f"Medians, allocation of the outputs counted. Contenders take turns in bursts of {harness.BURST} calls; `cold` "
        f"is the first of each burst, after the others went through the caches. {told}."
    )
    text = f"# edlstm_gates, float32\n\n{how}\n\n{table(rows)}"
    print(text)
    if arguments.save:
        harness.save("edlstm_gates_cpu", {"machine": machine, "rows": rows}, text)


if __name__ == "__main__":
    main()
