"""The instruments see what they are there for, and see nothing of it in the kernels.

A small part of ``make asan`` and ``make tsan``: errors that were planted (csrc/instruments/planted.cpp), then tests of
every kernel in every instruction set, on the shapes, strides, masks and trees that hypothesis draws.
"""

from dataclasses import dataclass
from functools import cache

import instruments
import pytest
from instruments import INSTRUMENTS, Instrument

from vpfast.ops import _native

TILES = _native.extension is not None and _native.extension.isa() == "amx"


@dataclass(frozen=True)
class Planted:
    """Two calls of operators of vpfast_planted, one with an error and one without, and what is said of the error."""

    instrument: str
    wrong: str
    right: str
    said: str
    tiles: bool = False


PLANTED = {
    "beyond the end": Planted(
        "address", "write(torch.zeros(100), 100)", "write(torch.zeros(100), 99)", "heap-buffer-overflow"
    ),
    "before the start": Planted(
        "address", "write(torch.zeros(100), -1)", "write(torch.zeros(100), 0)", "heap-buffer-overflow"
    ),
    "too far a shift": Planted(
        "address", "shift(torch.zeros(64))", "shift(torch.zeros(62))", "shift exponent 64 is too large"
    ),
    "a tile beyond the end": Planted(
        "address", "load_tile(torch.zeros(256), 4)", "load_tile(torch.zeros(256), 0)", "READ of size 64", True
    ),
    "no barrier": Planted("thread", "team(torch.zeros(3), 3, False)", "team(torch.zeros(3), 3, True)", "data race"),
    "tiles of two threads": Planted(
        "thread", "store_tiles(torch.zeros(512), 2, 240)", "store_tiles(torch.zeros(512), 2, 256)", "data race", True
    ),
}

OPS, MODELS = "tests/ops/test_{}.py::test_{}", "tests/models/test_{}.py::test_{}"
_RASTER = [f"{isa}-Mask3d(name='raster', window=None)" for isa in ("plain", "avx2", "avx512", "amx")]
_OF_ISAS = ("edlstm_gates", "edlstm_gates_backward", "codeword_search, tree", "codeword_search_train, tree")
_SHARED = [f"{isa}-{operator}" for isa in ("plain", "avx2", "avx512") for operator in _OF_ISAS]
_TEAMS = [f"{isa}-{clips}-3" for isa in ("plain", "avx2", "avx512") for clips in (1, 2)]
SMALL = {
    # Problems of any shape, stride, type, mask and tree.
    "address": [
        OPS.format("edlstm_gates", "any_shape_and_stride"),
        OPS.format("codeword_search", "any_size_and_stride"),
        OPS.format("codeword_search_train", "any_size"),
        OPS.format("masked_attention3d", "any_grid_mask_and_stride"),
        OPS.format("masked_attention3d", "decode_anywhere"),
        MODELS.format("compiled_sampler", "networks_of_any_size"),
        MODELS.format("bfloat16_sampler", "as_near_to_exact_arithmetic_as_torch[grid0-depth-window]"),
        MODELS.format("mspn_tiles", "any_size"),
    ],
    # Problems that threads share.
    "thread": [
        *(OPS.format("operators", f"no_result_depends_on_the_number_of_threads[{case}]") for case in _SHARED),
        *(OPS.format("masked_attention3d", f"result_does_not_depend_on_threads[{case}]") for case in _RASTER),
        *(MODELS.format("compiled_sampler", f"any_number_of_threads_gives_the_same_codes[{case}]") for case in _TEAMS),
        MODELS.format("bfloat16_sampler", "together_or_alone_by_any_number_of_threads[likeliest-2-full]"),
        MODELS.format("mspn_tiles", "the_number_of_threads_changes_nothing[few channels]"),
    ],
}


@cache
def built(name: str) -> Instrument:
    instrument = INSTRUMENTS[name]
    missing = instruments.why_not(instrument)
    if missing:
        pytest.skip(f"needs a compiler with the instrument: {missing}")
    instruments.build(instrument)
    return instrument


@pytest.mark.parametrize("name", PLANTED)
def test_errors_on_purpose_are_seen(name: str) -> None:
    plant = PLANTED[name]
    if plant.tiles and not TILES:
        pytest.skip("needs a processor with matrix tiles (AMX)")
    instrument = built(plant.instrument)

    def call(operator: str) -> instruments.Outcome:
        code = f"torch.set_num_threads(3); torch.ops.vpfast_planted.{operator}; print('went on')"
        return instruments.run(instrument, ["-c", f"import torch, vpfast; {code}"])

    wrong = call(plant.wrong)
    assert wrong.code != 0
    assert plant.said in wrong.reports + wrong.output
    right = call(plant.right)
    assert (right.code, right.output, right.reports) == (0, "went on\n", "")


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_every_instruction_set_is_there(name: str) -> None:
    code = "from vpfast import _C; print(_C.build_info()['instrument'], _C.isa())"
    outcome = instruments.run(built(name), ["-c", code])
    assert _native.extension is not None
    assert (outcome.code, outcome.output) == (0, f"{name} {_native.extension.isa()}\n")


@pytest.mark.parametrize("name", INSTRUMENTS)
def test_nothing_is_seen_in_the_kernels(name: str) -> None:
    outcome = instruments.pytest(built(name), ["-q", *SMALL[name]])
    assert outcome.code == 0, outcome.output
    assert outcome.reports == ""
