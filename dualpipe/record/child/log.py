"""The event log of one rank: one JSON object an event, in order."""

from __future__ import annotations

import dis
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import dropwhile
from pathlib import Path
from traceback import walk_stack, walk_tb
from types import FrameType
from typing import Any

Event = dict[str, Any]
Sink = Callable[[Event], None]
_Step = tuple[FrameType, int]  # a frame and the line that it is at

OURS = str(Path(__file__).parent)
CALLERS = 3  # lines, besides that of the call itself
PACKAGES = ("torch", "typing_extensions")  # torch wraps functions of its own in ``typing_extensions.deprecated``
LIBRARIES = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
_ANY_ARGUMENTS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
_CALL_WITH_THEM = dis.opmap["CALL_FUNCTION_EX"]


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
    return next((line for line, _ in _program_lines(walk_stack(frame))), "") or _innermost(walk_stack(frame))


def call_path() -> str:
    """The current line of the program, and the lines from which it called its function: ``a.py:7 (called at b.py:3)``.

    A message is often posted by a helper, whose line is the same for all messages.  So is that of a wrapper which only
    passes its arguments on, such as a decorator's: it is left out, unless there are no other callers.
    """
    frame = sys._getframe(1)
    line, *callers = _with_callers(walk_stack(frame)) or [_innermost(walk_stack(frame))]
    return f"{line} (called at {', '.join(callers[:CALLERS])})" if callers else line


class _Number:
    """The number of a call, kept in its frame; Python calls it as a trace function only while a program is traced."""

    count = 0

    def __init__(self) -> None:
        _Number.count += 1
        self.number = _Number.count

    def __call__(self, *args: Any) -> None:
        return None


def call_number(names: Collection[str]) -> int | None:
    """The number of the innermost call in progress of a function with one of the names; ``None`` if there is none."""
    for frame, _ in walk_stack(sys._getframe(1)):
        if frame.f_code.co_name in names:
            if frame.f_trace is None:
                frame.f_trace = _Number()
            return frame.f_trace.number if isinstance(frame.f_trace, _Number) else id(frame)
    return None


def lines_of(error: BaseException) -> list[str]:
    """The innermost line of the program that an error has passed, and the lines from which its function was called.

    From a line of an installed package these begin with the one that called the package.
    """
    passed = [*walk_tb(error.__traceback__)][::-1]
    line, *outer = _with_callers(passed) or [_innermost(passed)]
    if "site-packages" in line:
        outer = [*dropwhile(lambda other: "site-packages" in other, outer)] or outer
    return [line, *outer[:CALLERS]]


def callers() -> list[str]:
    """The lines of the program that are in progress, from the innermost one outwards, as in ``call_path``."""
    return _with_callers(walk_stack(sys._getframe(1)))[: 1 + CALLERS]


def _with_callers(frames: Iterable[_Step]) -> list[str]:
    """The innermost line of the program, and those of its callers that do more than pass their arguments on.

    If none of them does more, these are all callers.
    """
    lines = [*_program_lines(frames)]
    kept = [line for line, passes_on in lines[1:] if not passes_on]
    return [line for line, _ in lines[:1]] + (kept or [line for line, _ in lines[1:]])


def _passes_on(frame: FrameType) -> bool:
    """Whether a frame is in a call with the arguments of its own, whatever these are: ``f(*args, **kwargs)``."""
    code, at = frame.f_code, frame.f_lasti
    return code.co_flags & _ANY_ARGUMENTS == _ANY_ARGUMENTS and at >= 0 and code.co_code[at] == _CALL_WITH_THEM


def _program_lines(frames: Iterable[_Step]) -> Iterator[tuple[str, bool]]:
    """The lines of the program in frames from the innermost one outwards, and whether each only passes arguments on.

    A line that repeats the last is left out.
    """
    last = ""
    for frame, number in frames:
        file, module = frame.f_code.co_filename, str(frame.f_globals.get("__name__", ""))
        if _is_launcher(module):
            return
        of_library = module.partition(".")[0] in PACKAGES or (
            file.startswith(LIBRARIES) and "site-packages" not in file
        )
        line = f"{file}:{number}"
        if line != last and not of_library and not file.startswith((OURS, "<")):
            yield line, _passes_on(frame)
            last = line


def _is_launcher(module: str) -> bool:
    """Whether a module runs the recorded program, so that its own callers are not lines of the program."""
    return module.startswith(("dualpipe.testing.", "_pytest.", "pluggy."))


def _innermost(frames: Iterable[_Step]) -> str:
    """The innermost line in a file outside of this package, or an empty text."""
    found = ((frame.f_code.co_filename, number) for frame, number in frames)
    return next((f"{file}:{number}" for file, number in found if not file.startswith((OURS, "<"))), "")
