"""Whatever cannot be served ends in exit code 2 and one line: no traceback, nothing written, nothing changed.

``bad_commands.py`` draws the requests. ``make bad-commands`` tries a thousand of them; VPFAST_BAD_COMMANDS and
VPFAST_BAD_COMMANDS_SEED say how many and which.
"""

import contextlib
import ctypes
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from random import Random

import bad_commands
import numpy as np
import pytest
from bad_files import Things
from good_commands import FRAMES, SMALL, commands
from PIL import Image

from vpfast.cli import answered, demo, main
from vpfast.metrics import Report
from vpfast.training.tables import TABLES, Entry, page

COUNT = int(os.environ.get("VPFAST_BAD_COMMANDS", "100"))
SEED = int(os.environ.get("VPFAST_BAD_COMMANDS_SEED", "0"))
PROCESSES = max(2, COUNT // 25) if COUNT >= 1000 else 2
"""How many more are given to a process of their own."""

MEMORY = 8 << 30
LONGEST = 120  # seconds


@pytest.fixture(scope="module")
def things(tmp_path_factory, weights, code_weights, future_weights):
    """Good files of all kinds, which no request may change."""
    folder = tmp_path_factory.mktemp("good")
    made = Things(
        weights={"mspn": weights, "hrvqvae": code_weights, "shrvqvae": future_weights},
        video=folder / "film.avi",
        frames=folder / "frames",
        videos=folder / "videos",
        codes=folder / "film.vpc",
        prepared=folder / "prepared",
        config=folder / "small.yaml",
        record=folder / "record.json",
        table=folder / "table.json",
        run=folder / "run",
    )
    write_films(made)
    made.config.write_text("loss: {norm: sum_squares}\nkeep: 1\n")
    row = {"contender": "vpfast", "p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "peak_bytes": 4}
    record = {"format": 1, "name": "x", "about": "x", "device": "cpu", "rehearsed": False, "machine": {}, "slopes": []}
    made.record.write_text(json.dumps({**record, "rows": [{"case": "a", **row}, {"case": "b", **row}]}))
    table = TABLES["mspn-3"]
    report = Report("mspn", 3, {"mse": 0.1}, {"mse": [0.1] * 10})
    entry = Entry("vpfast: run", ("yes",) * (len(table.labels) - 1), table.parts[0].key, "3 clips", 3, report)
    made.table.write_text(json.dumps(page.to_dict(table, [entry], "mspn")))
    for command in makers(made):
        assert main(list(map(str, command))) == 0
    return made


def makers(things):
    """The commands that make the things that a command makes."""
    small = [f"{name}={value}" for name, (value,) in {**SMALL, "--out": [things.run]}.items()]
    size = "--size=[16, 24]"
    yield ["encode", things.video, "--weights", things.weights["hrvqvae"], "--out", things.codes]
    yield ["data", "prepare", "folder", "--src", things.videos, "--out", things.prepared, "--channels=1", size]
    yield ["train", *small, "--model.preset=compact", "--model.channels=[4, 8]", "--model.levels=1"]


def write_films(things):
    """The same 24 frames of 16x24, in which a bright column moves, as files and as a folder of pictures."""
    import av

    pictures = np.zeros((FRAMES, 16, 24, 3), np.uint8)
    for index, picture in enumerate(pictures):
        picture[:, index : index + 2] = 255
    things.frames.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(things.frames / f"{index}.png")
    for path in (things.video, things.videos / "train" / "film.avi"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))


@pytest.mark.parametrize("number", range(COUNT))
def test_what_cannot_be_served_is_refused_in_one_line(number, things, tmp_path, monkeypatch, capfd):
    with asked(number, things, tmp_path) as request:
        monkeypatch.chdir(tmp_path / "work")
        with unprivileged(), limited(), warnings.catch_warnings(record=True) as warned:
            code = answer(request)
        _, err = capfd.readouterr()
        check(request, code, err + "".join(f"{each.category.__name__}: {each.message}\n" for each in warned))


def test_each_begins_as_one_that_is_served(things, tmp_path, monkeypatch, capfd):
    """Else it would be refused for another reason than is thought. All of them where there is time, else some."""
    served = [each for each in commands(things) if each.served]
    for number, command in enumerate(served[:: 1 if COUNT >= 1000 else 6]):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        argv = bad_commands.words_of(command, {}, Random(SEED))
        assert main(argv) == 0, f"{argv}\n{capfd.readouterr().err}"


@pytest.mark.parametrize("number", range(COUNT, COUNT + PROCESSES))
def test_so_it_is_in_a_process_of_its_own(number, things, tmp_path):
    with asked(number, things, tmp_path) as request:
        words = (
            ["-m", "vpfast.cli.demo", *request.argv[1:]]
            if request.argv[:1] == ("demo",)
            else ["-m", "vpfast", *request.argv]
        )
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path / "work",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            preexec_fn=give_up_privileges,
            capture_output=True,
            timeout=4 * LONGEST,
        )
        check(request, done.returncode, done.stderr.decode(errors="replace"))


@contextlib.contextmanager
def asked(number, things, tmp_path):
    """The request of that number, after which nothing may be there that was not, or other than it was."""
    (tmp_path / "files").mkdir()
    (tmp_path / "work").mkdir()
    request = bad_commands.request(things, tmp_path / "files", SEED, number)
    places = [tmp_path, things.video.parent, *things.weights.values()]
    before = list(map(listing, places))
    yield request
    for place, was in zip(places, before, strict=True):
        now = listing(place)
        changed = sorted(str(path) for path in now.keys() | was.keys() if now.get(path) != was.get(path))
        assert not changed, f"{told(request)}\nleft or changed {changed}"


def listing(folder):
    """What is in a folder: kind, size and time of change by path."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            facts = os.lstat(os.path.join(place, name))
            found[os.path.relpath(os.path.join(place, name), folder)] = (
                facts.st_mode,
                *((facts.st_size, facts.st_mtime_ns) if name in files else ()),
            )
    return found


def answer(request):
    """The exit code, in this process."""
    name, *rest = request.argv or ("",)
    try:
        return answered(lambda: demo.main(rest), "demo") if name == "demo" else main(request.argv)
    except Exception as error:
        raise AssertionError(f"{told(request)}\n{error!r}") from error


def check(request, code, err):
    assert code == 2, f"{told(request)}\nexit code {code}: {err}"
    assert err.startswith("vpfast: "), f"{told(request)}\n{err}"
    assert err.count("\n") == 1, f"{told(request)}\n{err}"
    assert len(err) < 2000, f"{told(request)}\n{err}"
    assert err[:-1].isprintable(), f"{told(request)}\n{err!r}"


def told(request):
    return f"{request.wrong}\nvpfast {shlex.join(ascii(each)[1:-1] for each in request.argv)}"


@contextlib.contextmanager
def limited():
    """A request that takes for ever, or all memory there is, is a failure, not the end of the machine."""

    def late(*args):
        raise AssertionError(f"no answer after {LONGEST} seconds")

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


# Whoever is root may read and write everything. These two rights are what makes it so.
_OVERRIDE, _READ_ALL = 1, 2
_DROP_FROM_BOUNDING_SET = 24


@contextlib.contextmanager
def unprivileged():
    """Files that are closed to their owner are closed to root as well, in this thread."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    fewer = (ctypes.c_uint32 * 6)(*before)
    fewer[0] &= ~(1 << _OVERRIDE | 1 << _READ_ALL)
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


def give_up_privileges():
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None)
        for right in (_OVERRIDE, _READ_ALL):
            libc.prctl(_DROP_FROM_BOUNDING_SET, right, 0, 0, 0)
