"""The event log of one rank: one JSON object an event, in order."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

Event = dict[str, Any]
Sink = Callable[[Event], None]

_OURS = str(Path(__file__).parent)
_LIBRARIES = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})


def to_file(path: str) -> Sink:
    """A sink that appends to a file, one system call an event, so that no event is lost if the process is killed.

    Events of processes that the rank forks, such as workers of a data loader, are ignored.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    rank = os.getpid()

    def write(event: Event) -> None:
        if os.getpid() == rank:
            os.write(handle, (json.dumps(event) + "\n").encode())

    return write


def program_line() -> str:
    """The current line of the program: the innermost frame outside of torch, the standard library and this package."""
    frame = sys._getframe(1)
    seen = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_OURS, "<")):
            seen = seen or f"{name}:{frame.f_lineno}"
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if package != "torch" and not name.startswith(_LIBRARIES):
                return f"{name}:{frame.f_lineno}"
            if package != "torch" and "site-packages" in name:
                return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment] # None ends the loop
    return seen


def line_of(error: BaseException) -> str:
    """The innermost line of the program that an error has passed."""
    passed = [(frame, f"{frame.f_code.co_filename}:{line}") for frame, line in walk_tb(error.__traceback__)]
    return next((line for frame, line in reversed(passed) if _is_of_program(frame)), passed[-1][1] if passed else "")


def _is_of_program(frame: FrameType) -> bool:
    name, package = frame.f_code.co_filename, str(frame.f_globals.get("__name__", "")).partition(".")[0]
    of_library = package == "torch" or (name.startswith(_LIBRARIES) and "site-packages" not in name)
    return not of_library and not name.startswith((_OURS, "<"))
