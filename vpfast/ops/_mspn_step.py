"""The operator of the compiled MSPN step, which :mod:`vpfast.models` alone calls: it runs a program of instructions.

Every tensor is memory in which the program's addresses lie: ``arena`` is working room, ``state`` what lasts from step
to step. There is no reference beside it: that is :class:`vpfast.models.MSPN`. The kernel is csrc/mspn_step.
"""

from vpfast.ops._library import LIBRARY

LIBRARY.define(
    "mspn_step(Tensor program, Tensor(a!) arena, Tensor(b!) state, Tensor weights, Tensor frame, int pieces,"
    " int threads) -> ()"
)
