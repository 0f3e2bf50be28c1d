"""``vpfast bench``: the operators and models timed beside what one would use otherwise."""

import argparse
import importlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vpfast.cli import Parser

if TYPE_CHECKING:
    from vpfast.benchmarks.problem import Place

DESCRIPTION = """Time the operators and models beside what one would use otherwise.

A contender whose result is wrong ends the benchmark without a figure. With several benchmarks each runs in a process
of its own. Ctrl-C ends it; the cases measured until then are printed and, with --out, kept as NAME_DEVICE_stopped.
Exit status: 0; 1 where a result was wrong or, with --compare, something of vpfast's became slower or takes more memory
beyond noise; 2 where the request cannot be served; 130 after Ctrl-C."""

STOPPED = 128 + signal.SIGINT


def run(argv: Sequence[str]) -> int:
    """Measure, list or compare; see DESCRIPTION for the exit status."""
    options = _parser().parse_args(argv)
    if options.compare:
        _check_alone(options)
        return compare(*options.compare)
    registry = importlib.import_module("vpfast.benchmarks.registry")
    names = registry.chosen(options.names)
    _check(options)
    if options.list:
        return listing(names, options)
    if len(names) > 1:
        return one_by_one(names, argv, options)
    return measure(names[0], options)


def _parser() -> Parser:
    parser = Parser(
        prog="vpfast bench",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which benchmarks, all when left out; see --list")
    parser.add_argument("--list", action="store_true", help="show the benchmarks and their cases, and measure nothing")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="TEXT",
        help="the cases whose title contains this; may be given several times ('growth' takes those that vary a size)",
    )
    parser.add_argument("--no-growth", action="store_true", help="leave out how time and memory grow with a size")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: cpu)")
    parser.add_argument("--seconds", type=float, metavar="S", help="time for a case (default: 6, on a GPU 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep NAME_DEVICE.json and .md there, replaced")
    parser.add_argument("--plot", action="store_true", help="draw PNGs beside the records; needs --out")
    parser.add_argument("--rehearse", action="store_true", help="small, on a CPU, to see that it runs")
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="measure nothing: show what changed from record A to record B beyond noise, where the ranges from the "
        "20th to the 80th percentile do not meet",
    )
    return parser


def _check_alone(options: argparse.Namespace) -> None:
    """--compare measures nothing, so whatever says what to measure is a mistake."""
    given = [f"--{name}" for name in ("list", "case", "seconds", "out", "plot", "rehearse") if getattr(options, name)]
    if given or options.names:
        raise ValueError(f"--compare A.json B.json goes alone, got {', '.join([*options.names, *given])} too")


def _check(options: argparse.Namespace) -> None:
    if options.seconds is not None and not 0 < options.seconds < float("inf"):
        raise ValueError(f"--seconds {options.seconds}: must be above 0")
    if options.plot:
        if options.out is None:
            raise ValueError("--plot draws beside the records: say with --out FOLDER where")
        importlib.import_module("matplotlib")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise NotADirectoryError(f"--out {options.out}: is a file, must be a folder")


def _place(options: argparse.Namespace) -> "Place":
    """Where it runs; ValueError where there is no GPU."""
    import torch

    from vpfast.benchmarks.problem import Place

    gpu = options.device == "cuda"
    if gpu and not options.rehearse and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; --rehearse goes the same way, small, on a CPU")
    return Place("cpu" if options.rehearse else options.device, gpu, options.rehearse)


def listing(names: Sequence[str], options: argparse.Namespace) -> int:
    """Names, what they are, and the titles of their cases."""
    from vpfast.benchmarks import measure, registry

    place = _place(argparse.Namespace(**{**vars(options), "rehearse": options.device == "cuda" or options.rehearse}))
    place = type(place)(place.device, place.gpu, options.rehearse)
    for name in names:
        benchmark = registry.load(name)
        print(f"{name}\n  {benchmark.about}")
        for title in measure.titles(benchmark, place) if options.device in benchmark.places else ():
            print(f"    {title}")
    return 0


def one_by_one(names: Sequence[str], argv: Sequence[str], options: argparse.Namespace) -> int:
    """Each in a process of its own: memory that one keeps, threads and compiled code are not the next one's."""
    given = [arg for arg in argv if arg not in options.names]
    worst = 0
    for name in names:
        code = _process([sys.executable, "-m", "vpfast", "bench", name, *given])
        worst = max(worst, code if code > 0 else 1 if code else 0)
        if code in (2, STOPPED):
            break
    return worst


def _process(command: Sequence[str]) -> int:
    """Its exit code. Ctrl-C, which the terminal sends to both, is the command's to answer: it has figures to keep."""
    with subprocess.Popen(command) as process:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGINT, before)


def measure(name: str, options: argparse.Namespace) -> int:
    """One benchmark: print its page, keep record and pictures."""
    from vpfast.benchmarks import harness, record, registry
    from vpfast.benchmarks.measure import of_benchmark
    from vpfast.benchmarks.problem import WrongResultError
    from vpfast.cli._denormals import denormals_as_zero

    place, benchmark = _place(options), registry.load(name)
    if options.device not in benchmark.places:
        print(f"{name} runs on {', '.join(benchmark.places)} alone: left out", file=sys.stderr)
        return 0
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    machine = harness.machine(place.device)  # now: a benchmark may tie the process to one core
    seconds = options.seconds or (1.0 if place.gpu else 6.0)
    try:
        with denormals_as_zero():  # as `vpfast train` has it, for every contender
            found = of_benchmark(benchmark, place, seconds, options.case, not options.no_growth, _progress)
    except WrongResultError as error:
        print(f"vpfast: {name}: {error}: no figures", file=sys.stderr)
        return 1
    rows, bars, stopped = found
    made = record.make(benchmark, place, machine, seconds, rows, bars, stopped)
    print(record.page(made), flush=True)
    if options.out is not None:
        paths = [record.write(made, options.out)]
        if options.plot:
            paths += importlib.import_module("vpfast.benchmarks.plots").write_all(made, options.out)
        print("\nwrote " + ", ".join(map(str, paths)), file=sys.stderr)
    return STOPPED if stopped else 0


def _progress(title: str) -> None:
    print(f"... {title}", file=sys.stderr, flush=True)


def compare(before: Path, after: Path) -> int:
    """What changed; 1 where something of vpfast's is worse beyond noise."""
    from vpfast.benchmarks import compare as comparing
    from vpfast.benchmarks import record

    old, new = record.read(before), record.read(after)
    try:
        found = comparing.compare(old, new)
    except ValueError as error:
        raise ValueError(f"--compare {before} {after}: {error}") from error
    print(comparing.told(old, new, found))
    return 1 if found.worse else 0
