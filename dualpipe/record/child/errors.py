"""Errors of the program: during which op each was raised, and at which line."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from .log import callers, lines_of

_DURING = "_dualpipe_during"  # the attribute of an error in which ``note`` keeps this


def note(error: BaseException, what: str, numbers: Iterable[int], freed: str = "") -> None:
    """Note in an error what was running when it was raised, unless an inner call has noted that already.

    ``what`` is F, B, M (a message), C (a collective) or R (what was received), and ``numbers`` the numbers of these in
    the log; ``freed`` is where the output of a backward had been freed, if it had.
    """
    if not hasattr(error, _DURING):
        with suppress(AttributeError, TypeError):  # raised for a class whose instances take no attributes
            setattr(error, _DURING, (what, sorted(numbers), callers(), freed))


def describe(error: BaseException) -> dict[str, Any]:
    """The fields of the event for the error that ends a program."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if isinstance(error, SystemExit):  # as torch.multiprocessing ends a process after an error
        error = next((other for other in chain[1:] if isinstance(other, Exception)), error)
    during = next((found for other in chain if (found := getattr(other, _DURING, None)) is not None), None)
    at, *passed = lines_of(error)
    what, numbers, lines, freed = during or (None, (), (), "")
    if outer := [line for line in lines or passed if line != at]:
        at = f"{at} (called at {', '.join(outer)})"
    running = None if what is None else (what, numbers)
    found = {"error": type(error).__name__, "text": _text(error), "during": running, "time": time.time(), "place": at}
    return found | {"freed": freed}


def _text(error: BaseException) -> str:
    """The text of an error; that of its class may raise another one."""
    try:
        return str(error)
    except Exception as other:
        return f"its __str__ raises {type(other).__name__}"
