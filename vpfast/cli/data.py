"""``vpfast data``: a data set's own files decoded once into arrays that training reads fast, and a check of them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from tqdm import tqdm

from vpfast.cli import Parser
from vpfast.cli._options import Options
from vpfast.cli._video import from_zero
from vpfast.data import DataError
from vpfast.data.moving_digits import SPLITS
from vpfast.data.prepare import check, prepare
from vpfast.data.prepared import Index, read_index
from vpfast.data.sets import SOURCES

DESCRIPTION = (
    "Decode a data set once, for training on it with --data.kind prepared --data.root OUT: its frames, resized, in "
    "uint8 arrays, and index.json with their checksums. `vpfast data prepare NAME --help` tells how NAME's files are "
    "laid out and its options. Stopped, the same command goes on where it was."
)

_REASON = "processes that decode (default: one a core); 0 decodes in this one"


def run(argv: Sequence[str]) -> int:
    """Prepare or check; returns 0."""
    if argv and argv[0] == "prepare" and len(argv) > 1 and not argv[1].startswith("-"):
        return _prepare(argv[1], argv[2:])
    options = _parser().parse_args(argv)
    return _check(options) if options.action == "check" else 0


def _parser() -> Parser:
    parser = Parser(prog="vpfast data", description=DESCRIPTION, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True, metavar="prepare|check")
    made = actions.add_parser("prepare", help="make a prepared set", description=DESCRIPTION, allow_abbrev=False)
    made.add_argument("name", choices=sorted(SOURCES), metavar="NAME", help=", ".join(sorted(SOURCES)))
    text = "Read every array of a prepared set against its index, and tell what is in it."
    checked = actions.add_parser("check", help="read all of one", description=text, allow_abbrev=False)
    checked.add_argument("folder", type=Path, help="the prepared set")
    checked.add_argument(
        "--workers", type=from_zero, default=_cores(), help="processes that read (default: a core each)"
    )
    return parser


def _prepare(name: str, argv: Sequence[str]) -> int:
    if name not in SOURCES:
        raise ValueError(f"data prepare {name}: no such data set; there are {', '.join(sorted(SOURCES))}")
    kind = SOURCES[name]
    options = Options(f"vpfast data prepare {name}", " ".join((kind.__doc__ or "").replace("``", "").split()))
    options.add("src", str | None, None, "the folder with the data set's own files")
    options.add("out", str | None, None, "the folder to make")
    options.add("workers", int, _cores(), _REASON)
    options.add_flag("force", "replace what was prepared there with other options, or is damaged")
    hints, made = get_type_hints(kind), kind()
    fields = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for entry in dataclasses.fields(kind):  # type: ignore[arg-type]
        options.add(entry.name, hints[entry.name], getattr(made, entry.name), entry.metadata["help"])
    values = options.parse(argv)
    for key in ("src", "out"):
        if not values[key]:
            raise ValueError(f"--{key} is missing (`vpfast data prepare {name} --help` shows what is accepted)")
    source = kind(**{key: _hashable(values[key]) for key in fields})
    done = prepare(source, values["src"], values["out"], values["workers"], True, values["force"], _note)
    print(f"{values['out']}: {done.decoded} recordings decoded, {done.kept} already there\n")
    print(_summary(done.index))
    return 0


def _note(text: str) -> None:
    tqdm.write(f"note: {text}")  # above the progress bar


def _check(options: Any) -> int:
    wrong = check(options.folder, options.workers, progress=True)
    print(_summary(read_index(options.folder)))
    for complaint in wrong:
        print(complaint)
    if wrong:
        raise DataError(f"{options.folder}: {len(wrong)} files are not what the index says; the first: {wrong[0]}")
    return 0


def _summary(index: Index) -> str:
    """What is in a prepared set, as markdown."""
    (height, width), colour = index.size, "RGB" if index.channels == 3 else "grey"
    lines = [
        f"{index.name}, {height}x{width} (height x width) {colour}",
        "",
        "| split | recordings | frames | shortest | longest | MiB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for split in SPLITS:
        frames = [entry.shape[0] for entry in index.recordings if entry.split == split]
        if frames:
            size = sum(frames) * index.channels * height * width / 2**20
            lines.append(f"| {split} | {len(frames)} | {sum(frames)} | {min(frames)} | {max(frames)} | {size:.1f} |")
    return "\n".join(lines)


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _cores() -> int:
    return len(os.sched_getaffinity(0))
