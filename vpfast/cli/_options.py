"""Configurations from YAML files and dotted options, read by jsonargparse."""

import argparse
import dataclasses
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter

from vpfast.cli import check_values
from vpfast.training.config import leaves, unknown_key

Deep = dict[str, dict[str, Any]]
"""The type of an option that takes keys below keys."""

_MOST_NODES = 100_000  # a few lines of aliases can stand for more than fits into memory


class Help(DefaultHelpFormatter):
    """Types and defaults in the words of a YAML file; not those that are none, or that the option shows already."""

    def _expand_help(self, action: argparse.Action) -> str:
        text: str = super()._expand_help(action)
        found = re.search(r" \((?:type: ([^()]*), default: .*|default: (?:False|null))\)$", text)
        return text if found is None else text[: found.start()] + _in_brackets(found[1] or "", action.default)


def _in_brackets(kind: str, default: Any) -> str:
    told = [kind.replace(" | null", " or null")] if re.fullmatch(r"(int|float)( \| null)?", kind) else []
    if default is True or default not in (None, False, {}, [], ()):
        shown = list(default) if isinstance(default, tuple) else "true" if default is True else default
        told.append(f"default: {shown}")
    return f" ({', '.join(told)})" if told else ""


class Options:
    """A jsonargparse parser whose complaints are one-line ValueErrors that name the key and the nearest valid one."""

    def __init__(self, prog: str, description: str) -> None:
        self.parser = ArgumentParser(
            prog=prog,
            description=description,
            formatter_class=Help,
            exit_on_error=False,
            allow_abbrev=False,
            print_config=None,  # `vpfast train --dry-run` shows it checked
        )
        self.parser.add_argument("--config", action="config", help="a YAML file, or a name of a packaged one")
        self._free: set[str] = set()
        self._deep: set[str] = set()
        self._flags: set[str] = set()

    def add(self, name: str, kind: Any, default: Any, text: str) -> None:
        """One option. A dictionary takes any key below it, one of dictionaries also keys below those."""
        if kind in (dict[str, Any], Deep):
            self._free.add(name)
        if kind == Deep:
            self._deep.add(name)
        self.parser.add_argument(f"--{name}", type=kind, default=default, help=text)

    def add_flag(self, name: str, text: str) -> None:
        """An option without a value."""
        self._flags.add(name)
        self.parser.add_argument(f"--{name}", action="store_true", help=text)

    def add_config(self, kind: type[Any], prefix: str = "", defaults: Any = None) -> None:
        """An option for every field of a configuration class, nested ones with dots."""
        given = {} if defaults is None else dataclasses.asdict(defaults)
        for key, hint, default, text in leaves(kind):
            value = given
            for part in key.split(".") if given else ():
                value = value[part]
            self.add(prefix + key, hint, value if given else default, text)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """Nested plain values, of the declared types.

        Raises:
            ValueError: an unknown key, a value of the wrong type, a configuration that cannot be read.
        """
        check_values(argv)
        args, deep = self._without_deep(self._named_configs(argv))
        try:
            values = self.parser.parse_args(args)
        except (ArgumentError, TypeError) as error:
            raise ValueError(_one_line(str(error))) from error
        result: dict[str, Any] = values.as_dict()
        result.pop("config")
        for key, text in deep:
            *above, last = key.split(".")
            place = result
            for part in above:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise ValueError(f"--{key}: {part} is {place!r}, which holds no keys")
            place[last] = _value(text)
        return result

    def _without_deep(self, args: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """The arguments without those for a key far below an option, and these as (key, value).

        jsonargparse takes a key one step below a dictionary; two steps below, it forgets what a file gave beside it.
        """
        kept: list[str] = []
        deep: list[tuple[str, str]] = []
        rest = iter(args)
        for arg in rest:
            name, equals, value = arg.partition("=")
            if name[:2] == "--" and name[2:].partition(".")[0] in self._deep and name.count(".") >= 2:
                given = value if equals else next(rest, None)
                if given is None or given[:2] == "--":
                    raise ValueError(f"{name}: expected one argument")
                deep.append((name[2:], given))
            else:
                kept.append(arg)
        return kept, deep

    def _named_configs(self, argv: Sequence[str]) -> list[str]:
        """The arguments with every ``--config NAME`` replaced by its file; all keys are checked on the way."""
        known = {name for action in self.parser._actions for name in action.option_strings}
        args: list[str] = []
        rest = iter(argv)
        for arg in rest:
            name, equals, value = arg.partition("=")
            if name.startswith("--") and name not in known and not self._is_free(name[2:]):
                name = _other_spelling(name, known)
                arg = name + equals + value
            if name != "--config":
                args.append(arg)
                continue
            path = config_file(value if equals else next(rest, ""))
            self._check_keys(path, read_yaml(path))
            args += ["--config", str(path)]
        return args

    def _is_free(self, key: str) -> bool:
        return key in self._free or key.partition(".")[0] in self._free

    def _check_keys(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        keys = {name[2:] for action in self.parser._actions for name in action.option_strings if name[:2] == "--"}
        keys -= self._flags | {"help", "config"}
        for name, value in values.items():
            key = f"{prefix}{name}"
            below = any(known.startswith(key + ".") for known in keys)
            if key not in keys and not below:
                raise ValueError(f"{path}: {unknown_key(key, keys)}")
            if below and not isinstance(value, dict):
                raise ValueError(f"{path}: {key}: {value!r} given, must hold keys of its own")
            if below:
                self._check_keys(path, value, key + ".")


def _other_spelling(name: str, known: set[str]) -> str:
    """The option that ``name`` means where it has - for _, or _ for -.

    Raises:
        ValueError: there is none; the message holds the nearest.
    """
    for option in known:
        if option.replace("-", "_") == name.replace("-", "_"):
            return option
    raise ValueError(unknown_key(name, known))


def config_file(name: str) -> Path:
    """The file that ``--config`` means: a path, or a packaged configuration such as ``mspn/moving-digits``.

    Raises:
        FileNotFoundError: neither; the message lists the packaged ones.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = Path(str(files("vpfast") / "configs"))
    if name and (packaged / f"{name}.yaml").is_file():
        return packaged / f"{name}.yaml"
    names = ", ".join(sorted(str(path.relative_to(packaged).with_suffix("")) for path in packaged.rglob("*.yaml")))
    raise FileNotFoundError(f"--config {name}: no such file, and no packaged configuration (there are: {names})")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: it is not one; the message names the file.
    """
    try:
        text = path.read_text()
        _refuse_twice(path, yaml.compose(text, yaml.SafeLoader), iter(range(_MOST_NODES)))
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {_one_line(str(error))}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: something in it holds itself") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold keys and values, got {type(values).__name__}")
    return values


def _refuse_twice(path: Path, node: yaml.Node | None, budget: Iterator[int], prefix: str = "") -> None:
    """Raise ValueError for a key that is there twice and for more nodes than ``budget`` has numbers, RecursionError
    where something holds itself."""
    if next(budget, None) is None:
        raise ValueError(f"{path}: holds more than {_MOST_NODES} values, what its aliases repeat counted")
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_twice(path, value, budget, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{path}: {name}: given twice, in lines {lines[name]} and {line}")
        lines[name] = line
        _refuse_twice(path, value, budget, f"{name}.")


def _value(text: str) -> Any:
    """What an option's text means: as YAML has it, but that 3e-4 is a number."""
    try:
        return float(text) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text}: not readable as YAML: {_one_line(str(error))}") from error


def _one_line(message: str) -> str:
    """jsonargparse says 'Parser key "a.b": Expected a <class 'int'>. Got ...' over several lines."""
    line = " ".join(message.split())
    for pattern, plain in (
        (r'Parser key "([^"]+)"', r"\1"),
        (r"<class '(\w+)'>", r"\1"),
        (r"a typing\.Literal", "one of "),
        (
            r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)",
            r"Expected \1. Got value: \2",
        ),
    ):
        line = re.sub(pattern, plain, line)
    return f"{line} (several are given as a list: [1,2])" if "tuple" in line else line
