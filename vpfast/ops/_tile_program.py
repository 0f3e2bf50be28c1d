"""The operator of networks on matrix tiles, which :mod:`vpfast.models` alone calls: it runs a program of instructions.

Every tensor is memory in which the program's addresses lie: ``arena`` is working room, ``state`` what lasts from call
to call. There is no reference beside it: those are the models. The kernel is csrc/tile_program.
"""

from vpfast.ops._library import LIBRARY, refuse_vmap, register_fake

LIBRARY.define(
    "tile_program(Tensor program, Tensor(a!) arena, Tensor(b!) state, Tensor weights, Tensor frame, int pieces,"
    " int threads) -> ()"
)
register_fake("tile_program", lambda *arguments: None)
refuse_vmap("tile_program", "a batch of clips is one call: give the model the whole batch")
