"""Compiles Triton kernels for GPUs that are not there, and tells the registers and memory that each one takes.

A file that launches kernels ends with ``ahead_of_time()``, which lists them with the configurations that matter;
``benchmarks/resources.py`` makes a table of them. Triton must be imported without its interpreter
(``TRITON_INTERPRET``), which compiles nothing.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALIGNMENT = 16
"""What Triton asks of a pointer or a number, in bytes or in ones, to let it be marked as divisible."""


class Compilation(NamedTuple):
    """One kernel under one launch configuration.

    ``name`` tells it from the others of its file. ``signature`` gives each argument in order its Triton type: "*fp32",
    "*bf16", "i64", "fp32", "constexpr"; ``constexprs`` the values of those that are constants; ``divisible`` the names
    of pointers and numbers that a launch may take to be divisible by 16; ``fused`` whether a product may be rounded
    together with the sum that it goes into.
    """

    name: str
    kernel: Any  # a triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
    fused: bool = True


class Resources(NamedTuple):
    """Of one compiled kernel: registers a thread, bytes of local memory a thread, bytes of shared memory a block.

    Local memory is where registers are spilled to, and arrays that no register can hold: a kernel should have none.
    """

    registers: int
    spilled: int
    shared: int


def compile_for(compilation: Compilation, capability: int) -> Any:
    """Triton's compiled kernel for compute capability ``capability`` (80, 90, 100); no GPU is needed.

    Raises:
        TypeError: Triton's interpreter is on.
        Exception: Triton's own, where the kernel does not compile.
    """
    kernel = compilation.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise TypeError(f"{compilation.name}: nothing compiles under Triton's interpreter; unset TRITON_INTERPRET")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in compilation.divisible}
    source = ASTSource(kernel, compilation.signature, compilation.constexprs, attributes)
    options = {
        "num_warps": compilation.num_warps,
        "num_stages": compilation.num_stages,
        "enable_fp_fusion": compilation.fused,
    }
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources_of(compiled: Any) -> Resources:
    """What a kernel of ``compile_for`` takes."""
    registers, spilled = _registers_and_local_memory(compiled.asm["cubin"])
    return Resources(registers, spilled, compiled.metadata.shared)


def _registers_and_local_memory(cubin: bytes) -> tuple[int, int]:
    """As the cuobjdump that Triton brings reads them from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", told)
    if not found:
        raise RuntimeError(f"{' '.join(command)} tells nothing of registers: {told!r}")
    return max(int(row[0]) for row in found), max(int(row[1]) + int(row[2]) for row in found)
