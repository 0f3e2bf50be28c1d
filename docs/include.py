"""Pages of the site out of files of the repository: each thing is written once, where its code is.

A line ``<!-- include: PATH -->`` in a page is replaced by that file, ``<!-- include: PATH#Heading -->`` by what stands
under that heading of it, a ``.py`` file by its code. Links of the text that lead to a file which a page includes whole
lead to that page; links to other files become the text alone, for those files are no part of the site.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = Path(__file__).parent
INCLUDE = re.compile(r"^<!-- include: ([^#\n]+?)(?:#([^\n]+))? -->$", re.MULTILINE)
HEADING = re.compile(r"^(#{1,5}) (.*)$")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
PICTURES = ("assets/one-digit.png",)


def on_files(files: Any, config: Any) -> Any:
    """Pictures that included texts show go into the site."""
    for path in PICTURES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with what it includes."""
    return expanded(markdown, page.file.src_uri)


def expanded(markdown: str, page: str) -> str:
    """The text of ``page``, its path below docs/, with what it includes.

    Raises:
        PluginError: there is no such file or heading; the message names the page.
    """

    def included(match: re.Match[str]) -> str:
        path, heading = match.groups()
        if not (ROOT / path).is_file():
            raise PluginError(f"{page}: includes {path}, which is not there")
        text = (ROOT / path).read_text()
        if path.endswith(".py"):
            return f'```python title="{path}"\n{text}```'
        if heading:
            text = section(text, heading)
            if not text:
                raise PluginError(f"{page}: includes {path}#{heading}, and there is no such heading")
        elif re.search(r"^# ", markdown[: match.start()], re.MULTILINE):
            text = lowered(text)
        return LINK.sub(lambda link: _moved(link, path, page), text)

    return INCLUDE.sub(included, markdown)


def section(text: str, heading: str) -> str:
    """What stands below ``heading`` until the next one of its level or above; below the title, until the first one."""
    lines, level = [], 0
    for line, found in _with_headings(text):
        if found and level and (level == 1 or len(found[1]) <= level):
            break
        if level:
            lines.append(line)
        elif found and found[2] == heading:
            level = len(found[1])
    return "\n".join(lines).strip()


def lowered(text: str) -> str:
    """The text with every heading one level further down."""
    return "\n".join(f"#{line}" if heading else line for line, heading in _with_headings(text))


def _with_headings(text: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """Each line, and the match of its heading where it is one; a comment of a code block is none."""
    in_code = False
    for line in text.splitlines():
        in_code ^= line.startswith("```")
        yield line, None if in_code else HEADING.match(line)


def _homes() -> dict[str, str]:
    """The page below docs/ of every file that is included whole."""
    homes = {}
    for page in sorted(DOCS.rglob("*.md")):
        for path, heading in INCLUDE.findall(page.read_text()):
            if not heading:
                homes[path] = page.relative_to(DOCS).as_posix()
    return homes


def _moved(link: re.Match[str], source: str, page: str) -> str:
    """A link of the file ``source`` as it must be in ``page``."""
    picture, text, target, anchor = link.groups()
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    home = path if path in PICTURES else _homes().get(path)
    if home is None:
        return text
    return f"{picture}[{text}]({posixpath.relpath(home, posixpath.dirname(page) or '.')}{anchor or ''})"
