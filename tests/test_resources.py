"""Every GPU kernel compiles for GPUs that are not here, and none spills; benchmarks/resources.py would see it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ("8.0", "9.0a", "10.0")

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not os.access("/usr/local/cuda/bin/nvcc", os.X_OK), reason="needs nvcc"
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def resources(*arguments, **variables):
    paths = os.pathsep.join(filter(None, [variables.pop("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    command = [sys.executable, ROOT / "benchmarks" / "resources.py", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def lines_of(done, file):
    return [line for line in done.stdout.splitlines() if line.startswith(f"| {file} |")]


@needs_nvcc
def test_no_cuda_kernel_spills():
    sources = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
    done = resources(*(f"--source={path}" for path in sources))
    assert done.returncode == 0, done.stderr
    for path in sources:
        assert lines_of(done, path.name), f"no kernel was found in {path}"


@needs_triton
def test_no_triton_kernel_spills():
    files = [path for path in sorted(ROOT.glob("kernels/*.py")) if "def ahead_of_time" in path.read_text()]
    done = resources(*(f"--module=vpfast.kernels.{path.stem}" for path in files))
    assert done.returncode == 0, done.stderr
    for path in files:
        assert lines_of(done, path.name), f"{path} lists no kernel"


CUDA_SPILLS = """
__global__ void __launch_bounds__(1024, 2) greedy(float* x) {
  float kept[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) kept[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) x[i * 1024 + threadIdx.x] = kept[199 - i] * kept[(i * 7) % 200];
}
__global__ void modest(float* x) { x[threadIdx.x] *= 2; }
"""


@needs_nvcc
def test_a_spilling_cuda_kernel_is_named(tmp_path):
    (tmp_path / "some_cuda.cu").write_text(CUDA_SPILLS)
    done = resources("--source", str(tmp_path / "some_cuda.cu"))
    assert done.returncode == 1
    for target in TARGETS:
        assert f"greedy (some_cuda.cu) for {target} spills " in done.stderr
    assert "modest" in done.stdout
    assert "modest" not in done.stderr


@needs_nvcc
def test_a_cuda_kernel_that_does_not_compile_is_named(tmp_path):
    (tmp_path / "some_cuda.cu").write_text("__global__ void wrong() { nothing; }")
    done = resources("--source", str(tmp_path / "some_cuda.cu"))
    assert done.returncode == 1
    assert "some_cuda.cu for 9.0a does not compile" in done.stderr
    assert '"nothing" is undefined' in done.stderr


TRITON_KERNELS = """
import triton
import triton.language as tl

from vpfast.kernels._ahead_of_time import Compilation


@triton.jit
def keep(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(x + i, mask=i < n)
    tl.store(y + i, kept / tl.sum(kept), mask=i < n)


@triton.jit
def product(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(n):
        total = tl.dot(tl.load(x + k * BLOCK + i), tl.load(y + k * BLOCK + i), total)
    tl.store(x + i, total.to(tl.bfloat16))


@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), nothing)


def ahead_of_time():
    keeps = {"x": "*fp32", "y": "*fp32", "n": "i64", "BLOCK": "constexpr"}
    yield Compilation("modest", keep, keeps, {"BLOCK": 256}, 4, 1, ("x", "y"))
    yield Compilation("greedy", keep, keeps, {"BLOCK": 4096}, 1, 1)
    products = {"x": "*bf16", "y": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    yield Compilation("too much to share", product, products, {"BLOCK": 64}, 4, 20, ("x", "y"))
    yield Compilation("wrong", wrong, {"x": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 16}, 1, 1)
"""


@needs_triton
def test_wrong_triton_kernels_are_named(tmp_path):
    (tmp_path / "some_kernels.py").write_text(TRITON_KERNELS)
    done = resources("--module=some_kernels", PYTHONPATH=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 1
    for target in TARGETS:
        assert f"greedy (some_kernels.py) for {target} spills " in done.stderr
        assert f"too much to share (some_kernels.py) for {target} asks for" in done.stderr
        assert f"wrong of some_kernels for {target} does not compile" in done.stderr
    assert "nothing is not defined" in done.stderr
    assert "modest" in done.stdout
    assert "modest" not in done.stderr
