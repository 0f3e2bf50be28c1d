"""Commands that cannot be served, drawn by a seed: each begins as one that can, and then one thing in it goes wrong.

A wrong thing is an option (unknown, left out, without a value, with a wrong one, twice what goes once, beside one that
it does not go with), a file (missing, empty, cut off, foreign, a folder, a pipe, ...: ``bad_files.py``) or a place to
write. Each of them alone is reason enough to refuse, so that the answer is known without running anything.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import bad_files
from bad_files import Things
from good_commands import Command, commands


@dataclass(frozen=True)
class Request:
    """What is asked for, in words, and what is wrong with it."""

    argv: tuple[str, ...]
    wrong: str


def request(things: Things, folder: Path, seed: int, number: int) -> Request:
    """One of the requests of ``seed``; the files that it spoils are laid in ``folder``."""
    random = Random(f"{seed}.{number}")
    command = random.choice(commands(things))
    ways = [_wrong_value, _clash, _bad_file, _bad_place, _bad_words]
    for way in random.choices(ways, [8, 3, 6, 3, 2], k=20):
        if made := way(command, things, folder, random):
            return made
    return _bad_words(command, things, folder, random)


# --- ways to go wrong -----------------------------------------------------------------------------------------------


def _wrong_value(command: Command, things: Things, folder: Path, random: Random) -> Request:
    name = random.choice(list(command.wrong))
    values = [str(each) for each in command.wrong[name](random)]
    return Request(words_of(command, {name: values}, random), f"{name} {' '.join(values)}")


def _clash(command: Command, things: Things, folder: Path, random: Random) -> Request | None:
    if not command.clashes:
        return None
    options = random.choice(command.clashes)
    return Request(words_of(command, options, random), f"{options} beside the rest")


def _bad_file(command: Command, things: Things, folder: Path, random: Random) -> Request | None:
    if not command.inputs:
        return None
    name = random.choice(list(command.inputs))
    path, what = bad_files.spoiled(command.inputs[name], things, folder, random)
    return Request(words_of(command, {name: [path]}, random), f"{name}: {what}")


def _bad_place(command: Command, things: Things, folder: Path, random: Random) -> Request | None:
    if command.out is None:
        return None
    option, kind = command.out
    name = str(command.given.get(option, ["out.mp4"])[0])
    path, what = bad_files.bad_place(name, kind, things, folder, random)
    forced = {"--force": []} if command.forced and what != "there" and random.random() < 0.5 else {}
    return Request(words_of(command, {option: [path], **forced}, random), f"{option}: {what} {list(forced)}")


def _bad_words(command: Command, things: Things, folder: Path, random: Random) -> Request:
    """Something is wrong with the words, whatever they mean."""
    kind = random.choice(["left out", "misspelled", "unknown", "no value", "one too many"])
    argv = list(words_of(command, {}, random))
    if kind == "left out" and command.needed:
        name = random.choice(command.needed)
        return Request(words_of(command, {}, random, without=name), f"{name} left out")
    if kind == "misspelled":
        name = random.choice(list(command.wrong))
        place = random.randint(min(3, len(name)), len(name))
        made = name[:place] + random.choice("qxzj") + name[place:]
        return Request((*argv, made, "1"), f"{name} spelled {made}")
    if kind == "no value":
        name = random.choice(list(command.wrong))
        return Request((*argv, name), f"{name} without a value")
    if kind == "one too many":
        return Request((*argv, "surplus", "more"), "words too many")
    made = "--" + "".join(random.choices(string.ascii_lowercase + "-_.", k=random.randint(3, 30)))
    return Request((*argv, f"{made}q", "1"), "an option that there is not")


def words_of(
    command: Command, changes: Mapping[str, Sequence[object]], random: Random, without: str = ""
) -> tuple[str, ...]:
    """The words of a command: options in any order, with a space or an equals sign before a value that stands alone."""
    given = {name: values for name, values in {**command.given, **changes}.items() if name != without}
    positional = [str(value) for name, values in given.items() if name[0] != "-" for value in values]
    options = [(name, values) for name, values in given.items() if name[0] == "-"]
    random.shuffle(options)
    words: list[str] = []
    for name, values in options:
        joined = len(values) == 1 and (str(values[0])[:1] == "-" or random.random() < 0.3)
        words += [f"{name}={values[0]}"] if joined else [name, *map(str, values)]
    return (*command.words, *positional, *words)
