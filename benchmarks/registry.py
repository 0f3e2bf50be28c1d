"""Every benchmark by its name; imported when it is asked for."""

import importlib
from collections.abc import Sequence

from vpfast.benchmarks.problem import Benchmark

MODULES = {
    "edlstm_gates": "ops.bench_edlstm_gates",
    "codeword_search": "ops.bench_codeword_search",
    "masked_attention3d": "ops.bench_masked_attention3d",
    "mspn": "models.bench_mspn",
    "hrvqvae": "models.bench_hrvqvae",
    "sampler": "models.bench_sampler",
    "stream": "models.bench_stream",
    "graphs": "models.bench_graphs",
    "loading": "data.bench_loading",
}
"""Where each is; an operator's is called as the operator."""


def chosen(names: Sequence[str]) -> list[str]:
    """``names``, or all where there are none.

    Raises:
        ValueError: a name that is none; the message lists those that are.
    """
    for name in names:
        if name not in MODULES:
            raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(MODULES)}")
    return list(dict.fromkeys(names)) or list(MODULES)


def load(name: str) -> Benchmark:
    """The benchmark of that name, one of ``MODULES``."""
    benchmark: Benchmark = importlib.import_module(f"vpfast.benchmarks.{MODULES[name]}").BENCHMARK
    return benchmark
