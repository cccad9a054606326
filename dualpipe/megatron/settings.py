"""Reading settings by name, wherever they are kept, and the questions that the rules ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Question = Callable[[Any], "str | None"]
"""Tells what in some settings is asked for, or gives ``None``."""


class Settings:
    """Several objects read as one: an attribute is that of the first object that has it, else ``None``."""

    def __init__(self, *objects: object | None) -> None:
        self._objects = [each for each in objects if each is not None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return next((getattr(each, name) for each in self._objects if hasattr(each, name)), None)


def tell(name: str, value: object) -> str:
    """A setting and its value, as a complaint shows them."""
    return f"{name} is {value!r}"


def is_set(*names: str) -> Question:
    """The first of these that is set to anything that counts as true."""

    def came(settings: Any) -> str | None:
        return next((tell(name, getattr(settings, name)) for name in names if getattr(settings, name)), None)

    return came


def is_given(*names: str) -> Question:
    """The first of these that is not ``None``, be it 0."""

    def came(settings: Any) -> str | None:
        return next((tell(name, value) for name in names if (value := getattr(settings, name)) is not None), None)

    return came


def is_above_one(*names: str) -> Question:
    """The first of these that is a number above 1."""

    def came(settings: Any) -> str | None:
        return next((tell(name, value) for name in names if (value := getattr(settings, name) or 1) > 1), None)

    return came


def is_other_than(name: str, *allowed: object) -> Question:
    """The setting, if it is there and none of these."""

    def came(settings: Any) -> str | None:
        value = getattr(settings, name)
        return None if value is None or value in allowed else tell(name, value)

    return came


def holds(name: str, *words: str) -> Question:
    """The setting, if it is one of these words or a list with one of them."""

    def came(settings: Any) -> str | None:
        value = getattr(settings, name)
        given = [value] if isinstance(value, str) else list(value or ())
        return tell(name, value) if set(given) & set(words) else None

    return came
