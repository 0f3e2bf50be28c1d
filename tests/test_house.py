"""The shape of the house: every operator has its rooms, and imports run down the floors."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vpfast"
OPS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if (p / "register.py").is_file())

ROOMS = (
    "vpfast/ops/{op}/__init__.py",
    "vpfast/ops/{op}/reference.py",
    "vpfast/ops/{op}/register.py",
    "vpfast/ops/{op}/README.md",
    "csrc/{op}/{op}_cpu.cpp",
    "csrc/{op}/{op}_math.h",
    "csrc/{op}/{op}_cuda.cu",
    "kernels/{op}.py",
    "tests/ops/test_{op}.py",
    "tests/ops/test_{op}_gpu.py",
    "benchmarks/ops/bench_{op}.py",
)

# On a GPU Triton serves this operator; see its page.
WITHOUT = {"csrc/masked_attention3d/masked_attention3d_cuda.cu"}

# A part may import itself and the parts below it. `data`, `metrics` and `visual` stand on the ground: `_files`.
MAY_IMPORT = {
    "_files": set(),
    "ops": {"kernels"},
    "nn": {"ops"},
    "models": {"nn", "ops"},
    "stream": {"models", "nn", "ops"},
    "data": set(),
    "metrics": set(),
    "visual": set(),
    "training": {"models", "nn", "ops", "data", "metrics", "visual"},
    "benchmarks": {"training", "stream", "models", "nn", "ops", "data", "visual"},
    "cli": {"benchmarks", "training", "stream", "models", "nn", "ops", "data", "metrics", "visual"},
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("room", ROOMS)
def test_every_operator_has_its_rooms(op, room):
    assert (ROOT / room.format(op=op)).is_file() != (room.format(op=op) in WITHOUT)


@pytest.mark.parametrize("op", OPS)
def test_what_an_operator_says_of_its_cuda_source_is_so(op):
    backends = importlib.import_module(f"vpfast.ops.{op}.register").backends
    assert backends.cuda_source == (ROOT / f"csrc/{op}/{op}_cuda.cu").is_file()
    assert backends.triton == (ROOT / f"kernels/{op}.py").is_file()


@pytest.mark.parametrize("op", OPS)
def test_every_triton_kernel_is_compiled_ahead_of_time(op):
    defined = {node.name for node in ast.parse((ROOT / f"kernels/{op}.py").read_text()).body if hasattr(node, "name")}
    assert "ahead_of_time" in defined


def test_there_are_operators():
    assert {"codeword_search", "edlstm_gates", "masked_attention3d"} <= set(OPS)


def imported_parts(path):
    """The parts of vpfast that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "vpfast" and len(parts) > 1 and parts[1] in MAY_IMPORT:
                yield parts[1]


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_down_the_floors(part):
    folder = ROOT / "benchmarks" if part == "benchmarks" else PACKAGE / part
    files = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").is_file() else sorted(folder.rglob("*.py"))
    assert files
    for path in files:
        wrong = set(imported_parts(path)) - MAY_IMPORT[part] - {part, "_files"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


def test_no_file_needs_a_map():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.*"), *(ROOT / "kernels").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 600, f"{path.relative_to(ROOT)} is past 600 lines: split it"
