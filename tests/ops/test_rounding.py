"""What compilers make of sums of products that have to be rounded one by one, read in their code; no GPU is needed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Of every kernel that asks for it: fused operations on float64 and float32 in PTX, and on float64 in machine code.
COUNT = """
from vpfast.kernels import codeword_search, masked_attention3d
from vpfast.kernels._ahead_of_time import compile_for

for module in (codeword_search, masked_attention3d):
    for compilation in module.ahead_of_time():
        if compilation.kernel.__name__ in ("decide", "forward_kernel") and not compilation.fused:
            code = compile_for(compilation, 90).asm
            counts = code["ptx"].count("fma.rn.f64"), code["ptx"].count("fma.rn.f32"), code["sass"].count("DFMA")
            print(compilation.name, *counts, code["ptx"].count("mul.rn.f64"), sep="|")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_fuses_nothing_where_every_product_is_to_be_rounded():
    """The deciding search of codeword_search, and what takes the largest score off in masked_attention3d."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    decided = [row for row in rows if row[0].startswith("decide")]
    careful = [
        row for row in rows if "careful" in row[0] and "float64" not in row[0]
    ]  # whose products are sums of fused
    assert len(decided) >= 9
    assert careful
    for name, *fused, products in decided:
        assert fused == ["0", "0", "0"], name
        assert int(products) > 0, name
    for name, *fused, _ in careful:
        assert fused[:2] == ["0", "0"], name
