"""A short, seeded part of the fuzzing of the parsers of foreign bytes; ``fuzz.py`` does the long part."""

import random
import tracemalloc
from pathlib import Path

import hostile
import pytest

CORPUS = Path(__file__).parent / "corpus"
INPUTS = 2000


@pytest.mark.parametrize("target", hostile.TARGETS)
def test_what_the_fuzzer_has_met_is_met_again(target):
    files = sorted((CORPUS / target).iterdir())
    assert len(files) >= len(hostile.seeds()[target])
    for file in files:
        hostile.TARGETS[target](file.read_bytes())


@pytest.mark.parametrize("target", hostile.TARGETS)
def test_whole_files_spoiled_are_read_or_refused_by_name(target):
    """In little memory, too: numpy tells tracemalloc what it allocates, and no input here is worth a megabyte."""
    source = random.Random(20_260_101)
    whole = list(hostile.seeds()[target].values())
    for data in whole:
        hostile.TARGETS[target](data)
    tracemalloc.start()
    try:
        for _ in range(INPUTS):
            hostile.TARGETS[target](hostile.spoiled(source.choice(whole), source))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_checksums_can_be_made_to_fit():
    """Else the codes' parser is never reached behind the first checksum."""
    for data in hostile.seeds()["codes"].values():
        assert hostile.with_checksums(data) == data
    data = bytearray(hostile.codes_file())
    data[12] ^= 1  # the size of the codebook
    assert hostile.with_checksums(bytes(data)) != bytes(data)
    _, why = hostile.attempt(lambda: hostile.Codes.from_bytes(hostile.with_checksums(bytes(data))), ValueError)
    assert "checksum" not in why


@pytest.mark.parametrize("target", hostile.TARGETS)
def test_a_promise_broken_is_a_finding(target, monkeypatch):
    """The targets can fail: each does where its parser raises something else than its own error."""

    def break_down(*args):
        raise MemoryError

    monkeypatch.setattr(hostile, "read_idx", break_down)
    monkeypatch.setattr(hostile, "iter_seq", break_down)
    monkeypatch.setattr(hostile.Codes, "from_bytes", staticmethod(break_down))
    with pytest.raises(MemoryError):
        hostile.TARGETS[target](b"anything")
