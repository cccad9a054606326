"""Errors of the program: what each left on its way, and where it was raised."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from .log import callers, line_of

_DURING = "_dualpipe_during"  # an attribute of an error


def note(error: BaseException, what: str, numbers: Iterable[int]) -> None:
    """Note in an error what it leaves, unless it has left something before."""
    if not hasattr(error, _DURING):
        with suppress(AttributeError, TypeError):  # a class without attributes of its own
            setattr(error, _DURING, (what, sorted(numbers), callers()))


def describe(error: BaseException) -> dict[str, Any]:
    """The fields of the event for the error that ends a program."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if isinstance(error, SystemExit):  # as torch.multiprocessing ends a process after an error
        error = next((other for other in chain[1:] if isinstance(other, Exception)), error)
    during = next((found for other in chain if (found := getattr(other, _DURING, None)) is not None), None)
    at = line_of(error)
    what, numbers, lines = during or (None, (), ())
    if outer := [line for line in lines if line != at]:
        at = f"{at} (called at {', '.join(outer)})"
    left = None if what is None else (what, numbers)
    return {"error": type(error).__name__, "text": str(error), "during": left, "time": time.time(), "place": at}
