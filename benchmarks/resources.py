"""Registers, local and shared memory of every GPU kernel, compiled for GPUs that need not be there.

    python benchmarks/resources.py [--save] [--only edlstm_gates] [--source FILE.cu] [--module package.module]

Each csrc/*/*_cuda.cu is compiled by nvcc with the flags of setup.py, each Triton kernel by Triton in the launch
configurations that its ``ahead_of_time()`` lists. A kernel that does not compile, that spills registers to local
memory, or takes more shared memory than such a GPU has for a block, is named, and the exit status is 1.
"""

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vpfast._files import write_file
from vpfast.benchmarks.record import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = {"8.0": 80, "9.0a": 90, "10.0": 100}
"""Architectures as TORCH_CUDA_ARCH_LIST has them, and the compute capability that Triton is asked for."""
SHARED_MEMORY = {"8.0": 163 * 1024, "9.0a": 227 * 1024, "10.0": 227 * 1024}
"""What one block can have. A launch that asks for more fails, on the GPU and not before."""


@dataclass(frozen=True)
class Row:
    """Of a thread registers, bytes spilled and bytes of local memory, which also holds arrays indexed at run time; of a
    block bytes of shared memory, in CUDA C++ what is known when it is compiled."""

    file: str
    kernel: str
    target: str
    registers: int
    spilled: int
    local: int
    shared: int


class CompilationError(Exception):
    """What the compiler said."""


# --- CUDA C++ ---------------------------------------------------------------------------------------------------------


@cache
def setup() -> Any:
    spec = importlib.util.spec_from_file_location("vpfast_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def nvcc_command(nvcc: str, architecture: str) -> list[str]:
    """What setup.py compiles with, for one architecture; the source and ``-o`` are to follow."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    os.chdir(ROOT)
    built = setup().extension(setup().Decision("cuda", "cuda", "", nvcc=nvcc, architectures=architecture))
    macros = [f"-D{name}" if value is None else f"-D{name}={value}" for name, value in built.define_macros]
    folders = [f"-I{folder}" for folder in built.include_dirs]
    flags = built.extra_compile_args["nvcc"]
    return [nvcc, "-cubin", "-Xptxas", "-v", "-std=c++20", *COMMON_NVCC_FLAGS, *macros, *folders, *flags]


def compile_cuda(source: str, architecture: str, nvcc: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        command = [*nvcc_command(nvcc, architecture), source, "-o", f"{folder}/x.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompilationError(done.stderr.strip())
    return [Row(Path(source).name, name, architecture, *found) for name, *found in read_ptxas(done.stderr)]


def read_ptxas(said: str) -> Iterator[tuple[str, int, int, int, int]]:
    """(kernel, registers, bytes spilled, stack frame, shared memory) of each entry function of ``ptxas -v``."""
    said = subprocess.run(["c++filt", "--no-params"], input=said, capture_output=True, text=True, check=True).stdout
    for part in said.split("Compiling entry function '")[1:]:
        name = re.sub(r"\(anonymous namespace\)::|^void |(?<!\w)vpfast::|\(.*", "", part[: part.index("' for '")])
        registers = int(re.findall(r"Used (\d+) registers", part)[0])
        frames, spilled, shared = (
            max(map(int, re.findall(rf"(\d+) bytes {what}", part)), default=0)
            for what in ("stack frame", "spill stores", "smem")
        )
        yield name, registers, spilled, frames, shared


# --- Triton -----------------------------------------------------------------------------------------------------------


def compile_triton(module: str, index: int, architecture: str) -> list[Row]:
    from vpfast.kernels._ahead_of_time import compile_for, resources_of

    compilation = list(importlib.import_module(module).ahead_of_time())[index]
    try:
        found = resources_of(compile_for(compilation, TARGETS[architecture]))
    except Exception as error:
        raise CompilationError(f"{type(error).__name__}: {error}") from None
    file = f"{module.rpartition('.')[2]}.py"
    return [Row(file, compilation.name, architecture, found.registers, found.spilled, found.spilled, found.shared)]


# --- all of them ------------------------------------------------------------------------------------------------------

Job = tuple[str, Callable[..., list[Row]], tuple[Any, ...]]


def cuda_jobs(sources: list[str]) -> Iterator[Job]:
    nvcc, why_not = setup().find_nvcc()
    if nvcc is None:
        raise SystemExit(f"no CUDA kernel can be compiled: {why_not}")
    for source in sources:
        for architecture in TARGETS:
            yield f"{source} for {architecture}", compile_cuda, (source, architecture, nvcc)


def triton_jobs(modules: list[str]) -> Iterator[Job]:
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("no Triton kernel can be compiled: Triton is not installed (pip install triton)")
    for module in modules:
        for index, compilation in enumerate(importlib.import_module(module).ahead_of_time()):
            for architecture in TARGETS:
                what = f"{compilation.name} of {module} for {architecture}"
                yield what, compile_triton, (module, index, architecture)


def compile_all(jobs: list[Job]) -> tuple[list[Row], list[str]]:
    """The figures, and what is wrong with which kernel."""
    rows, wrong = [], []
    fresh = multiprocessing.get_context("spawn")  # torch and Triton have threads, which a fork would lose
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), fresh) as pool:
        for what, future in [(what, pool.submit(call, *arguments)) for what, call, arguments in jobs]:
            error = future.exception()
            if isinstance(error, CompilationError):
                wrong.append(f"{what} does not compile:\n{error}")
            else:
                rows += future.result()
    for row in rows:
        who = f"{row.kernel} ({row.file}) for {row.target}"
        if row.spilled:
            wrong.append(f"{who} spills {row.spilled} bytes a thread")
        if row.shared > SHARED_MEMORY[row.target]:
            wrong.append(f"{who} asks for {row.shared} bytes of shared memory; a block has {SHARED_MEMORY[row.target]}")
    return rows, wrong


def table(rows: list[Row]) -> str:
    """A line a kernel, a column a target."""
    found = {(row.file, row.kernel, row.target): f"{row.registers} / {row.local} / {row.shared}" for row in rows}
    kernels = dict.fromkeys((row.file, row.kernel) for row in rows)
    lines = [[*kernel, *(found.get((*kernel, target), "") for target in TARGETS)] for kernel in kernels]
    return markdown_table(["file", "kernel", *TARGETS], lines)


def tools() -> str:
    """Which compilers gave the figures."""
    nvcc, _ = setup().find_nvcc()
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    named = [found[1] for found in [re.search(r"release [\d.]+, (V[\d.]+)", release)] if found]
    told = [f"nvcc {named[0]}"] if named else []
    if importlib.util.find_spec("triton"):
        told.append(f"Triton {importlib.import_module('triton').__version__}")
    return ", ".join(told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="keep the table under benchmarks/results/")
    parser.add_argument("--only", default="", help="the files whose path contains this")
    parser.add_argument("--source", action="append", help="these .cu files, not those of csrc/")
    parser.add_argument("--module", action="append", help="these modules with ahead_of_time(), not those of kernels/")
    arguments = parser.parse_args()
    # The interpreter takes the kernels as they are imported and compiles nothing.
    os.environ.pop("TRITON_INTERPRET", None)

    chosen = arguments.source is not None or arguments.module is not None
    sources = arguments.source or ([] if chosen else map(str, sorted(ROOT.glob("csrc/*/*_cuda.cu"))))
    modules = arguments.module or ([] if chosen else [f"vpfast.kernels.{path.stem}" for path in triton_files()])
    jobs = [*cuda_jobs([path for path in sources if arguments.only in path])] if sources else []
    jobs += [*triton_jobs([name for name in modules if arguments.only in name])] if modules else []
    began = time.perf_counter()
    rows, wrong = compile_all(jobs)
    how = f"Registers of a thread / local memory of a thread / shared memory of a block, in bytes, by {tools()}."
    text = f"# GPU kernels, compiled without a GPU\n\n{how}\n\n{table(rows)}"
    print(text)
    print(f"\n{len(jobs)} compilations in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    if arguments.save:
        record = {"compilers": tools(), "rows": [asdict(row) for row in rows]}
        write_file(RESULTS / "gpu_resources.json", json.dumps(record, indent=1) + "\n")
        write_file(RESULTS / "gpu_resources.md", text + "\n")
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def triton_files() -> list[Path]:
    return sorted(path for path in ROOT.glob("kernels/*.py") if "def ahead_of_time" in path.read_text())


if __name__ == "__main__":
    sys.exit(main())
