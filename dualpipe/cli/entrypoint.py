"""``module:function``: a function of somebody's own that returns schedules.

The function runs here, in the command's process, before anything is judged; what goes on to a judge is the schedule
value alone, as if it had been read from a file.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from dualpipe.cli.interrupt import Terminated
from dualpipe.errors import RuleError, nearest
from dualpipe.schedule import Schedule
from dualpipe.schedulefile import loads

MOST = 1000
"""Schedules that one entry point may return; a generator that never ends is told so instead of being waited for."""

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_SIZES = {"ranks": "-P", "microbatches": "-M"}


def is_entry_point(text: str) -> bool:
    """Whether a text has the form ``package.module:function``."""
    return _FORM.fullmatch(text) is not None


def call(name: str, ranks: int | None, microbatches: int | None) -> list[Schedule]:
    """The schedules that an entry point returns: a ``Schedule``, the text of one, or an iterable of these.

    Parameters
    ----------
    name:
        ``module:function``.  The current directory comes first on the import path, as with ``python -m``.
    ranks, microbatches:
        Passed by keyword where the function has a parameter of that name and the value is not ``None``.

    Raises
    ------
    RuleError
        For a module or function that is not there, parameters that cannot be filled, an error of the function's
        own, and a result that is something else.
    ScheduleSyntaxError
        For a text that is no schedule; line and column are those of the text.
    """
    function = _find(name)
    arguments = _arguments(name, function, {"ranks": ranks, "microbatches": microbatches})
    with _told(f"{name} raised"):
        made = function(**arguments)
        items = list(islice(made, MOST + 1)) if _holds_several(made) else [made]
    if not items:
        raise RuleError("an entry point returns at least one schedule", f"{name} returned none", "return one")
    if len(items) > MOST:
        raise RuleError(
            f"an entry point returns at most {MOST} schedules", f"{name} goes on after that", "split it into several"
        )
    several = len(items) > 1
    return [_schedule(f"{name}[{at}]" if several else name, item) for at, item in enumerate(items)]


def _find(name: str) -> Callable[..., Any]:
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path[:1]:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        with _told(f"importing {module_name} raised"):
            found: Any = importlib.import_module(module_name)
    except RuleError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{module_name}.".startswith(f"{missing.name}."):
            raise RuleError(
                "an entry point is module:function, with a module that can be imported from the current directory",
                f"there is no module {missing.name}",
                nearest(str(missing.name), _modules_here(), "correct the name, or run the command where the module is"),
            ) from None
        raise
    reached = module_name
    for attribute in path.split("."):
        if not hasattr(found, attribute):
            members = getattr(found, "__dict__", {})
            functions = [other for other, value in members.items() if callable(value) and other[0] != "_"]
            raise RuleError(
                "an entry point is module:function",
                f"{reached} has no {attribute}",
                nearest(attribute, functions, "correct the name"),
            )
        found, reached = getattr(found, attribute), f"{reached}.{attribute}"
    if not callable(found):
        raise RuleError(
            "an entry point is a function", f"{name} is of type {type(found).__name__}", "return it from a function"
        )
    return found  # type: ignore[no-any-return] # callable is all that is asked


def _modules_here() -> list[str]:
    return [path.stem for path in Path().iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]


def _arguments(name: str, function: Callable[..., Any], sizes: dict[str, int | None]) -> dict[str, int]:
    """The sizes that the function takes, of those that were given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C keep theirs to themselves
        return {}
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = {parameter.name for parameter in parameters if parameter.kind in by_keyword}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        takes |= sizes.keys()
    given = {size: value for size, value in sizes.items() if value is not None and size in takes}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.kind not in variadic and parameter.name not in given:
            option = _SIZES.get(parameter.name)
            raise RuleError(
                "an entry point is called without arguments, or with ranks= and microbatches=",
                f"{name} needs {parameter.name}",
                f"give {option}" if option else "give it a default",
            )
    return given


@contextmanager
def _told(doing: str) -> Iterator[None]:
    """What the foreign code prints goes to standard error, and any error of its own becomes bad input."""
    try:
        with redirect_stdout(sys.stderr), _file_of_stdout_redirected():
            yield
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise RuleError(
            "an entry point returns a schedule without an error",
            f"{doing} {type(error).__name__}: {_first_line(error)} ({last.filename}:{last.lineno})",
            "correct it",
        ) from error


@contextmanager
def _file_of_stdout_redirected() -> Iterator[None]:
    """What children and C code print to file descriptor 1 goes to 2."""
    try:
        sys.__stdout__.flush() if sys.__stdout__ else None
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        with suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _first_line(error: BaseException) -> str:
    """An error is told on one line; the text of a foreign one may itself raise."""
    try:
        return next(iter(str(error).splitlines()), "")
    except Exception:
        return "(its text cannot be had)"


def _holds_several(made: Any) -> bool:
    return isinstance(made, Iterable) and not isinstance(made, Schedule | str | bytes | Mapping)


def _schedule(label: str, item: Any) -> Schedule:
    if isinstance(item, Schedule):
        return item
    if isinstance(item, str):
        return loads(item, label)
    raise RuleError(
        "an entry point returns a Schedule, the text of one, or an iterable of these",
        f"{label} is of type {type(item).__name__}",
        "use dualpipe.Schedule or dualpipe.loads",
    )
