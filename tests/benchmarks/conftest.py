"""A benchmark of two lines, and records made of it."""

import pytest
import torch

from vpfast.benchmarks import harness, measure, record
from vpfast.benchmarks.problem import OWN, Benchmark, Case, Growth, Place, Problem, hold

SMALL = Place(small=True)


@pytest.fixture(autouse=True)
def _memory_as_it_was(monkeypatch):
    """Where the process gets its memory from is not to change for the tests that follow."""
    monkeypatch.setattr(harness, "allocator", lambda mode: None)


def doubling(size, wrong=None):
    """vpfast and eager double a vector; ``wrong`` triples it."""

    def prepare(place):
        x = torch.ones(size)

        def check(name, found):
            hold(name, "largest difference", float((found[0] - 2 * x).abs().max()), 1e-6)

        names = (OWN, "eager")
        calls = {name: lambda name=name: (x * (3 if name == wrong else 2),) for name in names}
        return Problem(calls, check, moved=8 * size, flops=size, absent={"faiss": "not installed: pip install it"})

    return Case(f"{size} numbers", prepare)


@pytest.fixture
def benchmark_of():
    """A benchmark of one case and a growth, in which ``wrong`` is wrong."""

    def make(wrong=None):
        grown = Growth("doubling", "numbers", {size: doubling(size, wrong) for size in (64, 128, 256)}, {"time": 1.0})
        return Benchmark("edlstm_gates", "Doubling", "A note.", lambda p: [doubling(1000, wrong)], lambda p: [grown])

    return make


@pytest.fixture
def made(benchmark_of):
    """The record of that benchmark, measured for a moment."""
    rows, bars, _ = measure.of_benchmark(benchmark_of(), SMALL, 0.001, tell=lambda title: None)
    return record.make(benchmark_of(), SMALL, {"cpu": "none", "commit": "abc", "threads": 1}, 0.001, rows, bars)
