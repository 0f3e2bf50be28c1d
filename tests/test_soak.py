"""The soak itself: it sees what grows, is not alarmed by what does not, and goes through all its work."""

import json
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from statistics import median

import pytest
import soak
import torch
from soak import Sample

pytestmark = pytest.mark.alone  # what this process holds is what is looked at

SAMPLES = 40


def samples(**figures):
    """Over an hour; a figure is a function of the part of it that is over, from 0 to 1."""
    still = Sample(0.0, 400_000_000, 100_000_000, 500_000, 20, 4, 1, 0)
    parts = [number / (SAMPLES - 1) for number in range(SAMPLES)]
    return [replace(still, at=part, **{name: round(of(part)) for name, of in figures.items()}) for part in parts]


def grew(**figures):
    return {name for name, found in soak.judged(samples(**figures), "an hour").items() if found["grew"]}


def scatter(part):
    """Up and down, by nothing that lasts."""
    return 1e6 * ((part * 7919) % 1.0)


def test_what_does_not_grow_is_left_alone():
    assert grew() == set()
    assert (
        grew(resident_bytes=lambda part: 4e8 + 30 * scatter(part), malloc_bytes=lambda part: 1e8 + scatter(part))
        == set()
    )
    assert grew(malloc_bytes=lambda part: 1e8 - 5e6 * part) == set()


def test_caches_that_fill_at_first_are_no_leak():
    assert grew(resident_bytes=lambda part: 4e8 + 2e8 * min(part / 0.2, 1.0)) == set()


@pytest.mark.parametrize(
    ("name", "start", "an_hour"),
    [("resident_bytes", 4e8, 30e6), ("malloc_bytes", 1e8, 4e6), ("python_blocks", 5e5, 4e4)],
)
def test_what_grows_is_seen_through_scatter(name, start, an_hour):
    assert grew(**{name: lambda part: start + an_hour * (part + scatter(part) / 1e7)}) == {name}


@pytest.mark.parametrize("name", soak.COUNTS)
def test_what_is_left_behind_is_seen(name):
    assert grew(**{name: lambda part: 5 + 10 * part}) == {name}
    assert grew(**{name: lambda part: 5 + (part > 0.7)}) == {name}
    assert grew(**{name: lambda part: 5 + (0.7 < part < 0.9)}) == set(), "it was there for a while"


def test_a_line_takes_a_few_samples():
    with pytest.raises(ValueError, match="a line takes 4 samples after the warm-up at least, got 3 of 4"):
        soak.judged(samples()[:4], "an hour")


KEPT: list[object] = []


def leak(scene):
    """A thread, and two megabytes of tensors."""
    stop = threading.Event()
    threading.Thread(target=stop.wait, daemon=True).start()
    KEPT.extend((stop, torch.zeros(500_000)))


@pytest.fixture
def nothing_stays():
    yield
    for each in KEPT:
        if isinstance(each, threading.Event):
            each.set()
    KEPT.clear()


def test_a_leak_is_recorded_and_ends_in_1(monkeypatch, tmp_path, capsys, nothing_stays):
    monkeypatch.setattr(soak, "WORKS", (leak,))
    monkeypatch.setattr(soak, "SAMPLE_SECONDS", 0.0)
    out = tmp_path / "record.json"
    out.write_text(json.dumps({"name": "soak", "streams": {"of": {}}}))
    monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes", "0.001", "--frames", "0", "--out", str(out)])
    assert soak.main() == 1
    said = capsys.readouterr().out
    assert "everything at once: malloc_bytes grew: slope, an hour" in said
    assert "everything at once: threads grew: first" in said
    record = json.loads(out.read_text())
    assert set(record) == {"name", "streams", "mixed"}
    assert record["mixed"]["judged"]["malloc_bytes"]["grew"]
    assert len(record["mixed"]["samples"]["at"]) == 6


# What trains in stages is left to the soak: it takes as long as all the rest.
@pytest.mark.parametrize(
    "work", [work for work in soak.WORKS if work is not soak.train_codes], ids=lambda work: work.__name__
)
def test_all_work_is_done(work, tmp_path, scene):
    work(replace(scene, folder=tmp_path))


# Those in which weights are loaded, workers send tensors, and torch is asked for attributes ten thousand times a round.
@pytest.mark.parametrize("work", [soak.train_mspn, soak.command, soak.stream], ids=lambda work: work.__name__)
def test_a_round_keeps_no_python_object(work, tmp_path, scene):
    held = []
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        work(replace(scene, folder=folder))
        held.append(soak.look(number, folder).python_blocks)
    gained = [after - before for before, after in pairwise(held[1:])]
    assert median(gained) < 8, f"one round after the other holds so many objects more: {gained}"


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return soak.make_scene(tmp_path_factory.mktemp("scene"))


@pytest.mark.parametrize("name", soak.STREAMS)
def test_a_stream_is_looked_at_as_it_goes(name):
    seen = soak.streamed(name, frames=3)
    assert [sample.at for sample in seen] == [1, 2, 3]
    assert all(isinstance(sample.malloc_bytes, int) and sample.malloc_bytes > 10**6 for sample in seen)
