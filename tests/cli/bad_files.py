"""Good files of every kind that a command takes, and ways to spoil a copy of them so that it must be refused."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import safetensors
import safetensors.torch
import torch

Spoiled = tuple[object, str]
"""What to name on the command line, and what is wrong with it."""


@dataclass(frozen=True)
class Things:
    """What is good. ``weights``: by model, of frames of 16x24, three of them as context, grey."""

    weights: Mapping[str, Path]
    video: Path
    frames: Path
    videos: Path
    codes: Path
    prepared: Path
    config: Path
    record: Path
    table: Path
    run: Path


def spoiled(kind: str, things: Things, folder: Path, random: Random) -> Spoiled:
    """A file or folder of that kind with which something is wrong, laid in ``folder``."""
    spoil, *arguments = random.choice(_SPOILS[kind](things))
    return spoil(folder, random, *arguments)


# --- any file -------------------------------------------------------------------------------------------------------


def _missing(folder: Path, random: Random, good: Path) -> Spoiled:
    name = random.choice(
        [good.name, "nowhere/" + good.name, " ", "-", "~", "a\nb", "x" * 300, "*", "\x1b[2J", "\udcff"]
    )
    return folder / "absent" / name, "missing"


def _below_a_file(folder: Path, random: Random, good: Path) -> Spoiled:
    return _written(folder, good, b"x") / "inside", "below a file"


def _empty(folder: Path, random: Random, good: Path) -> Spoiled:
    return _written(folder, good, b""), "empty"


def _folder(folder: Path, random: Random, good: Path) -> Spoiled:
    path = folder / good.name
    path.mkdir()
    return path, "a folder"


def _pipe(folder: Path, random: Random, good: Path) -> Spoiled:
    os.mkfifo(folder / good.name)
    return folder / good.name, "a pipe"


def _socket(folder: Path, random: Random, good: Path) -> Spoiled:
    path, here = folder / good.name, os.open(".", os.O_RDONLY)
    os.chdir(folder)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.fchdir(here)
    os.close(here)
    return path, "a socket"


def _device(folder: Path, random: Random, good: Path) -> Spoiled:
    return "/dev/null", "a device"


def _link(folder: Path, random: Random, good: Path) -> Spoiled:
    path = folder / good.name
    path.symlink_to(random.choice([path, folder / "absent"]))
    return path, "a link to nowhere"


def _locked(folder: Path, random: Random, good: Path) -> Spoiled:
    path = _copied(folder, good)
    path.chmod(0)
    return path, "not permitted"


def _cut(folder: Path, random: Random, good: Path) -> Spoiled:
    data = good.read_bytes()
    return _written(folder, good, data[: random.randint(1, int(0.8 * len(data)))]), "cut off"


def _foreign(folder: Path, random: Random, good: Path) -> Spoiled:
    name, data = random.choice(
        [
            ("random bytes", random.randbytes(random.randint(1, 3000))),
            ("zeros", bytes(random.randint(1, 3000))),
            ("text", b"dear diary\n" * random.randint(1, 200)),
            ("a ZIP file", b"PK\x03\x04" + random.randbytes(200)),
            ("brackets", b"[" * 100_000),
            ("a PNG's head", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + b"\x7f\xff\xff\xff" * 4),
            ("a RIFF's head", b"RIFF\xff\xff\xff\xffAVI LIST" + random.randbytes(50)),
        ]
    )
    return _written(folder, good, data), name


_NOT_THERE = (_missing, _below_a_file, _link)
_NO_FILE = (*_NOT_THERE, _folder, _pipe, _socket, _device, _locked)
_NO_CONTENT = (_empty, _cut, _foreign)
_IN_PLACE = (_folder, _pipe, _socket, *_NO_CONTENT)
_Spoil = Callable[..., Spoiled]
_Ways = Callable[[Things], Sequence[tuple[Any, ...]]]


def _file(key: str, *more: _Spoil) -> _Ways:
    """What can be wrong with one file."""
    return lambda things: [(spoil, getattr(things, key)) for spoil in (*_NO_FILE, *_NO_CONTENT, *more)]


def _written(folder: Path, good: Path, data: bytes) -> Path:
    path = folder / good.name
    path.write_bytes(data)
    return path


def _copied(folder: Path, good: Path) -> Path:
    path = folder / good.name
    if good.is_dir():
        shutil.copytree(good, path)
    else:
        shutil.copy(good, path)
    return path


def _spoiled_inside(
    folder: Path, random: Random, good: Path, pattern: str, ways: Sequence[_Spoil] = _IN_PLACE
) -> Spoiled:
    """A folder in which one file is spoiled."""
    whole = _copied(folder, good)
    inside = random.choice(sorted(whole.glob(pattern)))
    scratch = folder / "scratch"
    scratch.mkdir()
    made, what = random.choice(ways)(scratch, random, inside)
    inside.unlink()
    os.rename(made, inside)
    scratch.rmdir()
    return whole, f"{inside.name} {what}"


def _lacking(folder: Path, random: Random, good: Path, pattern: str) -> Spoiled:
    whole = _copied(folder, good)
    inside = random.choice(sorted(whole.glob(pattern)))
    inside.unlink()
    return whole, f"without {inside.name}"


# --- JSON -----------------------------------------------------------------------------------------------------------

Edit = tuple[str, object]
"""A dotted key, numbers for places in lists, and what is put there; ``...`` deletes it."""


def _edited(folder: Path, random: Random, good: Path, edits: Sequence[Edit], inside: str = "") -> Spoiled:
    whole = _copied(folder, good)
    path = whole / inside
    key, value = random.choice(edits)
    values = json.loads(path.read_text())
    place: Any = values
    *above, last = (int(part) if part.isdecimal() else part for part in key.split("."))
    for part in above:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(values))
    return whole, f"{inside} with {key} {value!r}"


# --- weights --------------------------------------------------------------------------------------------------------

_CONFIG_EDITS: list[Edit] = [
    *(("model", value) for value in (..., None, 3, [], "lstm", {})),
    *(("config", value) for value in (..., None, 3, [], {}, "x")),
    *(("config.channels", value) for value in (..., 3, [], ["4"], [4, -8], [4, 9], None)),
    *(("config.in_channels", value) for value in (0, -1, 3, 1.5, "1", True, None, 2**70)),
    ("config.surplus", 1),
]
_TRAINING_EDITS: list[Edit] = [
    *(("context", value) for value in (0, -3, 1.5, "3", None, [3], 2**70, True)),
    *(("data.size", value) for value in (0, [16], [16, 24, 3], "16", None, [16, -24], [1.5, 16])),
    *(("data.fit", value) for value in ("stretch", None, 3)),
    *(("data", value) for value in (None, 3, [], "x")),
    *(("optim.lr", value) for value in (0, -1, "fast", None, float("nan"), float("inf"))),
    *(("model", value) for value in (None, 3, [])),
    ("surplus", 1),
    ("data.surplus", 1),
]


def _weights(*names: str) -> _Ways:
    def ways(things: Things) -> list[tuple[Any, ...]]:
        good = [things.weights[name] for name in names]
        others = [path for name, path in things.weights.items() if name not in names]
        return [
            *((spoil, path) for path in good for spoil in (*_NOT_THERE, _folder, _pipe, _empty, _foreign)),
            *((_spoiled_inside, path, "*") for path in good * 4),
            *((_lacking, path, pattern) for path in good for pattern in ("config.json", "*.safetensors")),
            *((_edited, path, _CONFIG_EDITS, "config.json") for path in good * 2),
            *((_edited, path, _TRAINING_EDITS, "training.json") for path in good * 2),
            *((_retold, path) for path in good * 3),
            *((_of_another_model, path) for path in others),
        ]

    return ways


def _of_another_model(folder: Path, random: Random, other: Path) -> Spoiled:
    return other, f"weights of {other.name}"


def _retold(folder: Path, random: Random, good: Path) -> Spoiled:
    """Tensors that are not the model's, in a file that is whole."""
    whole = _copied(folder, good)
    path = whole / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    name = random.choice([name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim])
    tensor = tensors.pop(name)
    what, changed = random.choice(
        [
            ("missing", {}),
            ("renamed", {f"{name}x": tensor}),
            ("longer", {name: torch.cat([tensor, tensor])}),
            ("empty", {name: tensor[:0]}),
            ("integer", {name: tensor.to(torch.int64)}),
            ("boolean", {name: tensor > 0}),
            ("double", {name: tensor.double()}),
            ("complex", {name: tensor.to(torch.complex64)}),
        ]
    )
    if random.random() < 0.1:
        what, changed, metadata = "told of otherwise", {name: tensor}, {"vpfast": random.choice(["{", "3", "[]", "{}"])}
    safetensors.torch.save_file({**tensors, **changed}, path, metadata)
    return whole, f"{name} {what}"


# --- videos ---------------------------------------------------------------------------------------------------------


def _too_short(folder: Path, random: Random, good: Path) -> Spoiled:
    whole = _copied(folder, good)
    for path in sorted(whole.iterdir())[2:]:
        path.unlink()
    return whole, "two frames alone"


def _video(things: Things) -> list[tuple[Any, ...]]:
    first = "[0-2].png"
    return [
        *((spoil, things.video) for spoil in (*_NO_FILE, *_NO_CONTENT)),
        *((_spoiled_inside, things.frames, first),) * 4,
        (_missing, things.frames),
    ]


def _video_of_a_clip(things: Things) -> list[tuple[Any, ...]]:
    return [*_video(things), (_too_short, things.frames)]


def _source(things: Things) -> list[tuple[Any, ...]]:
    """A folder of videos, in which a single one is spoiled."""
    return [
        *((spoil, things.videos) for spoil in (*_NOT_THERE, _folder, _pipe)),
        *((_spoiled_inside, things.videos, "train/*.avi"),) * 4,
    ]


# --- codes, configurations, prepared sets, records, runs ------------------------------------------------------------


def _flipped(folder: Path, random: Random, good: Path) -> Spoiled:
    data = bytearray(good.read_bytes())
    place = random.randrange(len(data))
    data[place] ^= 1 << random.randrange(8)
    return _written(folder, good, bytes(data)), f"a bit flipped at {place}"


def _longer(folder: Path, random: Random, good: Path) -> Spoiled:
    return _written(folder, good, good.read_bytes() + random.randbytes(random.randint(1, 20))), "more follows"


# None of them is of a key that the options give, which would take its place.
_YAML = (
    "steps: [",
    "a: b: c",
    "- 1\n- 2",
    "3",
    "null",
    "''",
    "%TAG",
    "\t",
    "@",
    "`",
    "<<: 3",
    "a: \x00",
    "\ud7ff: 1\n\x07",
    "steps: ten",
    "keep: null",
    "val_clips: 0",
    "steps: 2026-01-01",
    "steps: 1\nsteps: 1",
    "steps: &a [*a]",
    "steps: !!python/object:os.system x",
    "surplus: 1",
    "config: x",
    "help: 1",
    "1: 2",
    "? [a]\n: 1",
    "seed: -1",
    "keep: 0",
    "out: [1]",
    "optim: 3",
    "optim: {lr: .nan}",
    "optim: {lr: .inf}",
    "optim: {lr: 1_000_x}",
    "stages: {prior: 3}",
    "data: {train: x}",
    "data: {size: [1, 2, 3]}",
    "data: {size: {a: 1}}",
    "data: {kind: prepared}",
    "data: {root: 3, kind: prepared}",
    "model: []",
    "model: {layers: 3}",
    "model: {hidden_channels: [a]}",
    "model: {gate_order: [1]}",
    "model: {name: {a: 1}}",
    # nine lines of aliases that stand for 9^8 values
    "\n".join(["a: &a [x]", *(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi"))]),
)


def _bad_yaml(folder: Path, random: Random, good: Path) -> Spoiled:
    text = random.choice(_YAML)
    return _written(folder, good, text.encode("utf-8", "surrogatepass")), f"{text[:60]!r}"


def _worse_yaml(folder: Path, random: Random, good: Path) -> Spoiled:
    """A good file with a line that is wrong."""
    text = random.choice(["stepz: 3", "optim: 3", "  lr: 1", "model", "}", "data:", "out: {a: 1}", "seed: x"])
    return _written(folder, good, f"{good.read_text()}\n{text}\n".encode()), f"and {text!r}"


_INDEX_EDITS: list[Edit] = [
    *((key, value) for key in ("format", "size", "channels", "fit", "name", "options") for value in (..., None, [[]])),
    *(("recordings", value) for value in (..., None, 3, [3], [{}], "x")),
    *(("size", value) for value in ([0, 16], [16], [16, 24.5], [16, float("nan")], [1 << 50, 24])),
    *(("recordings.0.file", value) for value in (..., "../a.npy", "/etc/passwd", "a/../../b.npy", 3, "frames/no.npy")),
    *(("recordings.0.shape", value) for value in (..., [0, 1, 16, 24], [12, 3, 16, 24], [1 << 39, 1, 16, 24], "x", 3)),
    *(("recordings.0.split", value) for value in (..., "all", None, 3, [])),
    *(("recordings.0.sha256", value) for value in (..., "x", None, "0" * 64)),
    *(("recordings.0.fps", value) for value in ("x", float("inf"), [])),
    *(("recordings.0.step", value) for value in (0, -1, "x", 1.5)),
    *(("recordings.0.anchor", value) for value in (..., None, "middle", [])),
    *(("recordings.0.tags", value) for value in (..., None, [], {"a": 1})),
    *(("recordings.0.name", value) for value in (..., None, 3)),
]


def _prepared(things: Things) -> list[tuple[Any, ...]]:
    good = things.prepared
    return [
        *((spoil, good) for spoil in (*_NOT_THERE, _folder, _pipe, _empty)),
        *((_spoiled_inside, good, pattern) for pattern in ("index.json", "frames/*/*.npy") * 2),
        *((_lacking, good, pattern) for pattern in ("index.json", "frames/*/*.npy")),
        *((_edited, good, _INDEX_EDITS, "index.json"),) * 4,
    ]


_RECORD_EDITS: list[Edit] = [
    *((key, value) for key in ("format", "name", "device", "machine", "rows", "slopes") for value in (..., None, 7)),
    *(("rehearsed", value) for value in (True, 3, "x")),
    *(("rows", value) for value in ([], [3], [{}], [[]], {"a": 1}, "x")),
    *(("rows.0.case", value) for value in (..., 3, None, [])),
    *(("rows.0.contender", value) for value in (..., 3, None)),
    *(("rows.0.p50_ms", value) for value in ("x", None, [], -1, float("nan"), True)),
    *(("rows.0.p20_ms", value) for value in ("x", None, {})),
    *(("rows.0.peak_bytes", value) for value in ("x", [], {}, float("nan"))),
]
_TABLE_EDITS: list[Edit] = [
    *(("table", value) for value in (..., None, "mspn-4", 3, [])),
    *(("measured", value) for value in (..., None, 3, [3], [{}], [[]], {"a": 1}, "x")),
    *((f"measured.0.{key}", value) for key in ("method", "labels", "part", "clips", "report") for value in (..., 3)),
    *(
        (f"measured.0.report.{key}", value)
        for key in ("per_frame", "mean", "protocol")
        for value in (..., None, 3, "x")
    ),
    ("measured.0.parameters", "x"),
    ("measured.0.part", "nowhere"),
]


def _run(things: Things) -> list[tuple[Any, ...]]:
    good = things.run
    return [
        *((spoil, good) for spoil in (*_NOT_THERE, _folder, _pipe, _empty)),
        *((_spoiled_inside, good, "config.yaml", (_empty, _foreign, _folder)),) * 2,
        *((_spoiled_inside, good, "checkpoints/*/*", (_empty, _cut, _foreign, _folder)),) * 5,
    ]


_SPOILS: dict[str, _Ways] = {
    "video": _video,
    "clip": _video_of_a_clip,
    "videos": _source,
    "predicting weights": _weights("mspn", "shrvqvae"),
    "weights of codes": _weights("hrvqvae", "shrvqvae"),
    "weights": _weights("mspn", "hrvqvae", "shrvqvae"),
    "codes": _file("codes", _flipped, _flipped, _longer),
    "config": _file("config", *(_bad_yaml,) * 12, *(_worse_yaml,) * 4),
    "prepared": _prepared,
    "record": lambda things: [*_file("record")(things), *((_edited, things.record, _RECORD_EDITS),) * 10],
    "table": lambda things: [*_file("table")(things), *((_edited, things.table, _TABLE_EDITS),) * 10],
    "run": _run,
}


# --- places to write ------------------------------------------------------------------------------------------------


def bad_place(name: str, kind: str, things: Things, folder: Path, random: Random) -> Spoiled:
    """Where nothing can be written; options that belong to it follow the path.

    ``kind`` is ``"folder"``, ``"file"``, ``"replaced"``, a file that is replaced unasked, or an ending that the file
    must have. ``name`` would do.
    """
    ways = ["below a file", "long", "locked", "kernel's", "a folder", "no folder to replace"]
    of_file = ["nowhere", "a pipe", "there", "ending"]
    ways += {"folder": ["a file"], "file": of_file[:3], "replaced": of_file[:2]}.get(kind, of_file)
    way = random.choice(ways)
    path = folder / name
    if way == "below a file":
        path = things.video / name
    elif way == "long":
        path = folder / f"{'x' * 300}{name}"
    elif way == "locked":
        path = folder / "locked" / name
        path.parent.mkdir(mode=0o555)
    elif way == "kernel's":
        path = Path("/proc") / name
    elif way == "a folder":
        path.mkdir()
        (path / "thesis.tex").write_text("all of it")
    elif way == "no folder to replace":
        return random.choice(["/", "", things.video.parent]), way
    elif way in ("there", "a file"):
        path.write_text("of an earlier run")
    elif way == "a pipe":
        os.mkfifo(path)
    elif way == "ending":
        path = folder / random.choice(["out", "out.txt", f"out{kind}x", kind])
    else:
        path = folder / "absent" / name
    return path, way
