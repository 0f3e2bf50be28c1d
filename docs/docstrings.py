"""Docstrings as they are written in vpfast, told in Markdown: roles become code, and ``>>>`` lines a block of it."""

import re
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
TYPED = re.compile(r"(?:^[ ]*(?:>>>|\.\.\.) .*\n?)+", re.MULTILINE)


class Markdown(Extension):
    """Rewrites the docstring of every object that is read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """A docstring of reStructuredText's roles and lines typed at a prompt in Markdown."""
    return TYPED.sub(_block, ROLE.sub(r"`\1`", text))


def _block(typed: re.Match[str]) -> str:
    lines = typed[0].rstrip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    code = [line.lstrip()[4:] for line in lines]
    fenced = ["```python", *code, "```"]
    return "\n".join(" " * indent + line for line in fenced) + "\n"
