"""What the pages show is run: Python block by block, commands as far as their own parsers read them."""

import importlib
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from docs_pages import PAGES, ROOT, Block, blocks

import vpfast
import vpfast.cli
from vpfast.cli import _options
from vpfast.training import TrainConfig
from vpfast.training.config import from_dict

# Everything that is shown and not run, and why. Each block says so itself, in a comment that its page does not show.
NOT_RUN = {
    ("README.md", "compiling takes minutes; tests/export does"),
    ("vpfast/models/mspn/README.md", "needs a GPU; tests/models/test_graphed_step.py does"),
    ("vpfast/models/mspn/README.md", "needs a checkpoint of others; tests/models/test_mspn_released.py does"),
}

# What a block leaves to its reader, in a room that shows how a function is called.
GIVEN = {
    "vpfast/ops/edlstm_gates/README.md": "gates, c_prev = torch.randn(2, 32, 4, 4), torch.zeros(2, 8, 4, 4)",
    "vpfast/ops/codeword_search/README.md": "z, codebooks = torch.randn(9, 4), [torch.randn(3, 4), torch.randn(9, 4)]",
    "vpfast/ops/masked_attention3d/README.md": (
        "grid, positions = (2, 3, 4), torch.arange(24)\nq, k, v = torch.randn(3, 1, 2, 24, 8)"
    ),
    "vpfast/metrics/README.md": "batches = [torch.rand(2, 2, 3, 1, 32, 32)]",
}

# Fewer of what costs time, not of what is called.
SMALLER = {
    "vpfast/models/shrvqvae/README.md": [
        ("torch.rand(2, 20, 1, 64, 64)", "torch.rand(1, 4, 1, 64, 64)"),
        ("context=10", "context=2"),
        (":10]", ":2]"),
        ("horizon=10", "horizon=2"),
        ("num_futures=5", "num_futures=2"),
    ],
    "vpfast/models/mspn/README.md": [("torch.rand(2, 20, 1, 64, 64)", "torch.rand(1, 20, 1, 16, 16)")],
}
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]
WITH_COMMANDS = [page for page in PAGES if any(block.language == "sh" for block in blocks(page))]


def test_pages_are_found():
    assert {"README.md", "docs/faq.md", "docs/masks.md", "vpfast/models/mspn/README.md"} <= set(PAGES)
    assert "README.md" in WITH_PYTHON
    assert "README.md" in WITH_COMMANDS


def test_blocks_that_are_not_run_are_known():
    marked = {(page, block.reason) for page in PAGES for block in blocks(page) if block.reason}
    assert marked == NOT_RUN


def test_comments_that_mark_blocks_stand_right_before_them():
    comments = sum((ROOT / page).read_text().count("<!-- not run:") for page in PAGES)
    assert comments == sum(block.reason is not None for page in PAGES for block in blocks(page))


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    if page in GIVEN:
        exec(f"import torch, vpfast\n{GIVEN[page]}", names)
    for old, _ in SMALLER.get(page, ()):
        assert any(old in block.code for block in blocks(page)), f"{page} has no {old!r} any more"
    precision = torch.get_float32_matmul_precision()
    try:
        for block in blocks(page):
            if block.language == "python" and block.reason is None:
                exec(compiled(block), names)
                if page not in SMALLER:
                    check_shapes(block, names)
    finally:
        torch.set_float32_matmul_precision(precision)


def compiled(block: Block) -> Any:
    """The code of a block, with lines that an error names as those of its page."""
    code = block.code
    for old, new in SMALLER.get(block.page, ()):
        code = code.replace(old, new)
    return compile("\n" * (block.line - 1) + code, ROOT / block.page, "exec")


def check_shapes(block: Block, names: dict[str, Any]) -> None:
    """What is assigned on a line whose comment tells shapes, one a name, has them."""
    for targets, comment in re.findall(r"^(\w+(?:, \w+)*) = .*# (.*)$", block.code, re.MULTILINE):
        made, told = targets.split(", "), re.findall(r"\(\d+(?:, \d+)*,?\)", comment)
        for name, shape in zip(made, told, strict=True) if told else ():
            assert str(tuple(names[name].shape)) == shape, f"{block.page}, block at line {block.line}: {name}"


class Parsed(Exception):  # noqa: N818 - not an error
    """A command was read to its end."""


@pytest.fixture
def stopped(monkeypatch):
    """Commands end when they have read their options."""

    def ending(read):
        def wrapped(self, argv=None, *args):
            raise Parsed(read(self, argv, *args))

        return wrapped

    monkeypatch.setattr(_options.Options, "parse", ending(_options.Options.parse))
    for name in ("evaluate", "visualize", "report"):
        monkeypatch.setattr(importlib.import_module(f"vpfast.cli.{name}"), "read_first", lambda argv: (None, None))


def check_vpfast(argv: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises what ``vpfast`` would complain of in these arguments."""
    name, *rest = argv
    assert name in vpfast.cli.COMMANDS, f"vpfast {name}: no such command"
    command = importlib.import_module(f"vpfast.cli.{name}")
    if name == "doctor" or (name == "data" and rest[0] == "check"):
        with monkeypatch.context() as patch:
            patch.setattr(command, "_check" if name == "data" else "report", lambda *_: 0 if name == "data" else ())
            assert command.run(rest) == 0
    elif hasattr(command, "_parse"):
        command._parse(rest)
    elif name == "bench":
        options = command._parser().parse_args(rest)
        importlib.import_module("vpfast.benchmarks.registry").chosen(options.names)
    else:
        with pytest.raises(Parsed) as found:
            command.run(rest)
        if name == "train":
            values = {key: value for key, value in found.value.args[0].items() if key not in ("resume", "dry_run")}
            from_dict(TrainConfig, values)


def commands(block: Block, folder: Path) -> list[list[str]]:
    """The commands of a block as bash reads them: words without quotes, variables filled in. Nothing is run."""
    names = ("vpfast", "accelerate", "torchrun", "python", "pip", "make", "tensorboard")
    recorders = "\n".join(f'{name}() {{ printf "%s\\0" {name} "$@" >&3; printf "\\n\\0" >&3; }}' for name in names)
    script = f"PATH=\nset -eu\n{recorders}\n{block.code}"
    found = folder / "found"
    done = subprocess.run(
        ["/bin/bash", "-c", f"exec 3> '{found}'\n{script}"], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{block.page}, block at line {block.line}: {done.stderr}"
    said: list[list[str]] = [[]]
    for word in found.read_text().split("\0")[:-1]:
        if word == "\n":
            said.append([])
        else:
            said[-1].append(word)
    return said[:-1]


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_of_a_page_are_read(page, tmp_path, monkeypatch, stopped):
    monkeypatch.chdir(tmp_path)
    seen = 0
    for block in blocks(page):
        for words in commands(block, tmp_path) if block.language == "sh" else ():
            seen += 1
            try:
                check(words, monkeypatch)
            except (ValueError, OSError) as error:
                pytest.fail(f"{page}, block at line {block.line}: {' '.join(words)}: {error}")
    assert seen


def check(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises or fails where a command would complain."""
    name, *rest = words
    if name in ("accelerate", "torchrun"):
        name, *rest = words[words.index("-m") + 1 :]
    if name == "vpfast":
        check_vpfast(rest, monkeypatch)
    elif name == "python":
        assert (ROOT / rest[0]).is_file(), f"{rest[0]}: no such program"
    elif name == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), (
            f"make {rest[0]}: no such target"
        )
    elif name == "pip":
        assert extras(rest) <= known_extras(), f"{rest}: no such extra"


def extras(words: Sequence[str]) -> set[str]:
    """What pip is told to install beside the package: of ``.[cli]`` and ``vpfast[lpips,cli]``."""
    return {extra for word in words for found in re.findall(r"\[(.+)\]", word) for extra in found.split(",")}


def known_extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    return set(
        re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
    )


def test_extras_that_prose_names_are_there():
    named = {
        extra for page in PAGES for extra in re.findall(r"'(?:\.|vpfast)\[([a-z,]+)\]'", (ROOT / page).read_text())
    }
    assert "cli" in named
    assert {one for extra in named for one in extra.split(",")} <= known_extras()


@pytest.mark.parametrize(
    "wrong",
    [
        "vpfast predict clip.mp4 --weights run/weights --out there --horizn 3",
        "vpfast train --config mspn/none --out run",
        "vpfast train --config mspn/kth --optim.rate 3 --out run",
        "vpfast evaluate --weights run/weights --protokol predrnn",
        "vpfast bench no_such_operator",
        "vpfast data prepare kht --src a --out b",
    ],
)
def test_a_command_that_is_wrong_is_seen(wrong, tmp_path, monkeypatch, stopped):
    monkeypatch.chdir(tmp_path)
    (words,) = commands(Block("page", 1, "sh", wrong, None), tmp_path)
    with pytest.raises((ValueError, OSError)):
        check(words, monkeypatch)
