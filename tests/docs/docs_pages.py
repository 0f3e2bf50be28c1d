"""The fenced code of the pages that people read."""

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "vpfast").rglob("README.md"))
)
FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)
SHELL = ("vpfast ", "accelerate ", "torchrun ", "python ", "pip ", "make ")


class Block(NamedTuple):
    """A fenced block: where its code begins, in which language, why it is not run where it is not."""

    page: str
    line: int
    language: str
    code: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    """The blocks of a page from its top; one of commands, without a language, is ``sh``."""
    text = (ROOT / page).read_text()
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        code = match["code"]
        commands = not match["language"] and (code.startswith(SHELL) or re.match(r"[A-Z]+=", code))
        found.append(Block(page, line, "sh" if commands else match["language"], code, match["reason"]))
    return found
