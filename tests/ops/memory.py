"""How much memory a call takes, for the tests of operators that promise to need little."""

import ctypes
import re
from pathlib import Path

import pytest


def peak_of(call):
    """Bytes that the process held at most while ``call`` ran, beyond what it held before and the results: all memory,
    with what neither Python nor PyTorch counts."""

    def held(field):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
        before = held("VmRSS")
    except (OSError, AttributeError, TypeError):
        pytest.skip("needs glibc and Linux's /proc/self/clear_refs")
    result = call()
    peak = held("VmHWM")
    outputs = sum(t.nbytes for t in result)
    return peak - before - outputs
