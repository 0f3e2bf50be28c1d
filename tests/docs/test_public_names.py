"""The names without an underscore: few, told of, typed; and what the pages and examples use is among them."""

import ast
import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from docs_pages import PAGES, ROOT, blocks

PUBLIC = (
    *("vpfast", "vpfast.ops", "vpfast.nn", "vpfast.models", "vpfast.models.mspn", "vpfast.models.shrvqvae"),
    *("vpfast.data", "vpfast.data.sets", "vpfast.metrics", "vpfast.visual", "vpfast.training"),
)


def public_objects() -> Iterator[tuple[str, Any, str]]:
    """(whole name, function or class, what is told of it): what the parts offer, and the methods of their classes.

    A property may be told of by its class, and a method of PyTorch's by PyTorch.
    """
    for part in PUBLIC:
        module = importlib.import_module(part)
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.isclass(value) and not inspect.isfunction(value):
                continue
            yield f"{part}.{name}", value, value.__doc__ or ""
            for key, member in vars(value).items() if inspect.isclass(value) else ():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if inspect.isfunction(function) and not key.startswith("_"):
                    told = inspect.getdoc(getattr(value, key)) or ""
                    by_class = isinstance(member, property) and f"``{key}``" in value.__doc__
                    yield f"{part}.{name}.{key}", function, told or (value.__doc__ if by_class else "")


@pytest.mark.parametrize("part", PUBLIC)
def test_what_a_part_offers_is_listed(part):
    """And nothing else is in it by accident; modules below it are."""
    module = importlib.import_module(part)
    found = {name for name in vars(module) if not name.startswith("_")}
    by_accident = {name for name in found if not isinstance(getattr(module, name), types.ModuleType)}
    assert by_accident <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    assert len(set(module.__all__)) == len(module.__all__)


def test_public_names_are_documented_and_typed():
    undocumented, untyped = [], []
    for name, value, told in public_objects():
        if not told:
            undocumented.append(name)
        protocol = getattr(value, "_is_protocol", False)  # its __init__ is Python's
        function = None if protocol else vars(value).get("__init__") if inspect.isclass(value) else value
        if not inspect.isfunction(function):
            continue
        given = [each for each in inspect.signature(function).parameters if each not in ("self", "cls")]
        untyped += [f"{name}: {each}" for each in given if each not in function.__annotations__]
        if not inspect.isclass(value) and "return" not in function.__annotations__:
            untyped.append(f"{name}: what it returns")
    assert not undocumented
    assert not untyped


def imported(code: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each ``from vpfast... import name``; (module, "") of ``import vpfast...``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vpfast":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "vpfast")


def test_what_pages_and_examples_import_is_public():
    texts = {path.name: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    for page in PAGES:
        texts |= {f"{page}:{each.line}": each.code for each in blocks(page) if each.language == "python"}
    uses = [(where, *use) for where, code in texts.items() for use in imported(code)]
    assert len(uses) > 30
    for where, module, name in uses:
        assert module in PUBLIC, f"{where} imports from {module}, which is not public"
        assert not name or name in importlib.import_module(module).__all__, f"{where}: {module}.{name} is not public"


def test_hints_can_be_read():
    """By a program, as by a type checker."""
    for name, value, _ in public_objects():
        if inspect.isfunction(value):
            assert typing.get_type_hints(value), name
