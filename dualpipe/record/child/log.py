"""The event log of one rank: one JSON object an event, in order."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from types import FrameType
from typing import Any

Event = dict[str, Any]
Sink = Callable[[Event], None]

_OURS = str(Path(__file__).parent)
_CALLERS = 3  # lines, besides that of the call itself
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
    return next(_program_lines(sys._getframe(1)), "") or _innermost(sys._getframe(1))


def call_path() -> str:
    """The current line of the program, and the lines from which it called its function: ``a.py:7 (called at b.py:3)``.

    A message is often posted by a helper, whose line is the same for all messages.
    """
    line, *callers = [*islice(_program_lines(sys._getframe(1)), 1 + _CALLERS)] or [_innermost(sys._getframe(1))]
    return f"{line} (called at {', '.join(callers)})" if callers else line


def _program_lines(frame: FrameType | None) -> Iterator[str]:
    """The lines of the program in the frames from the innermost one outwards, each once."""
    last = ""
    while frame is not None and not _is_launcher(str(frame.f_globals.get("__name__", ""))):
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if line != last and _is_of_program(frame):
            yield line
            last = line
        frame = frame.f_back


def _is_launcher(module: str) -> bool:
    """Whether a module runs programs, so that its callers are no part of the program."""
    return module.startswith(("dualpipe.testing.", "_pytest.", "pluggy."))


def _innermost(frame: FrameType | None) -> str:
    """The innermost line in a file outside of this package."""
    while frame is not None and frame.f_code.co_filename.startswith((_OURS, "<")):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def line_of(error: BaseException) -> str:
    """The innermost line of the program that an error has passed."""
    passed = [(frame, f"{frame.f_code.co_filename}:{line}") for frame, line in walk_tb(error.__traceback__)]
    return next((line for frame, line in reversed(passed) if _is_of_program(frame)), passed[-1][1] if passed else "")


def _is_of_program(frame: FrameType) -> bool:
    file, package = frame.f_code.co_filename, str(frame.f_globals.get("__name__", "")).partition(".")[0]
    of_library = package == "torch" or (file.startswith(_LIBRARIES) and "site-packages" not in file)
    return not of_library and not file.startswith((_OURS, "<"))
