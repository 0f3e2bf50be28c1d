"""What the models' configurations share: named presets, and checks that name the field and its value."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

C = TypeVar("C", bound="ModelConfig")


@dataclass(frozen=True)
class ModelConfig(ABC):
    """Base of the frozen dataclasses that models are built from. A ``ValueError`` names the field and its value."""

    @classmethod
    @abstractmethod
    def presets(cls: type[C]) -> Mapping[str, C]:
        """The named configurations of this class."""

    @classmethod
    def preset(cls: type[C], name: str, **changes: Any) -> C:
        """A named configuration, with ``changes`` to single fields. Their names stand in the README of the model.

        Raises:
            ValueError: no such preset, no such field, or a value that cannot be.
        """
        presets = cls.presets()
        if name not in presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; choose one of {', '.join(map(repr, presets))}")
        fields = [field.name for field in dataclasses.fields(cls)]
        for change in changes:
            if change not in fields:
                raise ValueError(f"{cls.__name__} has no field {change!r}; its fields are {', '.join(fields)}")
        return dataclasses.replace(presets[name], **changes)

    @classmethod
    def checked(cls: type[C], config: object) -> C:
        """``config``; raise a TypeError if it is anything but a configuration of this class."""
        if isinstance(config, cls):
            return config
        example = f"{cls.__name__}.preset({next(iter(cls.presets()))!r})"
        raise TypeError(f"config must be of type {cls.__name__}, such as {example}, got {config!r}")

    def _refuse(self, name: str, reason: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}.{name} {reason}, got {getattr(self, name)!r}")

    def _check_counts(self, *names: str, lowest: int = 1) -> None:
        for name in names:
            if not is_count(getattr(self, name), lowest):
                self._refuse(name, "must be a positive integer" if lowest == 1 else f"must be an integer >= {lowest}")

    def _check_flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "must be true or false")

    def _check_choices(self, choices: Mapping[str, tuple[str, ...]]) -> None:
        for name, accepted in choices.items():
            if getattr(self, name) not in accepted:
                self._refuse(name, f"must be one of {', '.join(map(repr, accepted))}")


def is_count(value: object, lowest: int = 1) -> bool:
    """Whether ``value`` is an int, and no bool, of at least ``lowest``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def is_weight(value: object) -> bool:
    """Whether ``value`` is a finite number, and no bool, of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
