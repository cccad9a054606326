"""The process that calls an entry point ``module:function`` and hands back the text of its schedules.

It runs as a process of its own, so that whatever the foreign code does to its interpreter (exit, hang, change of
directory, threads, replaced modules) does not affect the caller.  The answer is one file, ``FOLDER/answer``, which
appears complete or not at all::

    {"texts": ["lane > 0 ...", ...]}      or      {"error": [rule, got, fix]}

``dualpipe.cli.entrypoint`` starts it, with a time limit, and reads the answer.
"""

from __future__ import annotations

import faulthandler
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from dualpipe.errors import RuleError, nearest
from dualpipe.schedule import Schedule
from dualpipe.schedule.text import dumps

MOST = 1000
"""The most schedules that one entry point may return, so that a generator that never ends is refused."""

_SIZES = {"ranks": "-P", "microbatches": "-M"}


def serve(folder: str, name: str, sizes: dict[str, int | None], limit: float, path: list[str]) -> None:
    """Call the entry point and write the answer.

    Parameters
    ----------
    folder:
        Where ``answer`` is written, and ``trace``, the traceback of a crash or of a process that ran out of time.
    sizes:
        ``ranks`` and ``microbatches``, passed by keyword where the function takes them and they are not ``None``.
    limit:
        Seconds after which the process ends itself, in case its parent has not ended it.
    path:
        The import path of the foreign code, without the current directory, which is added in front.
    """
    own = os.getpid()
    with open(os.path.join(folder, "trace"), "w") as trace:
        faulthandler.enable(trace)
        faulthandler.dump_traceback_later(limit, exit=True, file=trace)
        sys.path[:] = [os.getcwd(), *path]
        sys.argv[:] = [name]
        answer = json.dumps(_answer(name, sizes))
        faulthandler.cancel_dump_traceback_later()
        if os.getpid() != own:  # the function forked, and the child returned too
            os._exit(0)
        part = os.path.join(folder, "part")
        with open(part, "w") as file:
            file.write(answer)
        os.rename(part, os.path.join(folder, "answer"))
        faulthandler.disable()


def _answer(name: str, sizes: dict[str, int | None]) -> dict[str, Any]:
    try:
        function = _find(name)
        arguments = _arguments(name, function, sizes)
        with _reported(f"{name} raised"):
            made = function(**arguments)
            several = isinstance(made, Iterable) and not isinstance(made, Schedule | str | bytes | Mapping)
            items = list(islice(made, MOST + 1)) if several else [made]
        if not items:
            raise RuleError("an entry point must return at least one schedule", f"{name} returned none", "return one")
        if len(items) > MOST:
            raise RuleError(
                f"an entry point may return at most {MOST} schedules",
                f"{name} returned more",
                "split it up",
            )
        return {"texts": [_text(f"{name}[{at}]" if len(items) > 1 else name, item) for at, item in enumerate(items)]}
    except RuleError as error:
        return {"error": [error.rule, error.got, error.fix]}


def _find(name: str) -> Callable[..., Any]:
    module_name, _, path = name.partition(":")
    importlib.invalidate_caches()
    try:
        with _reported(f"importing {module_name} raised"):
            found: Any = importlib.import_module(module_name)
    except RuleError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{module_name}.".startswith(f"{missing.name}."):
            raise RuleError(
                "an entry point must be module:function, with a module that can be imported from the current directory",
                f"there is no module {missing.name}",
                nearest(str(missing.name), _modules_here(), "correct the name, or run the command where the module is"),
            ) from None
        raise
    reached = module_name
    for attribute in path.split("."):
        with _reported(f"getting {reached}.{attribute} raised"):
            there = hasattr(found, attribute)
        if not there:
            members = getattr(found, "__dict__", {})
            functions = [other for other, value in members.items() if callable(value) and other[0] != "_"]
            raise RuleError(
                "an entry point must be module:function",
                f"{reached} has no {attribute}",
                nearest(attribute, functions, "correct the name"),
            )
        with _reported(f"getting {reached}.{attribute} raised"):
            found, reached = getattr(found, attribute), f"{reached}.{attribute}"
    if not callable(found):
        raise RuleError(
            "an entry point must be a function",
            f"{name} is of type {type(found).__name__}",
            "return it from a function",
        )
    return found  # type: ignore[no-any-return] # it is only known to be callable


def _modules_here() -> list[str]:
    return [path.stem for path in Path().iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]


def _arguments(name: str, function: Callable[..., Any], sizes: dict[str, int | None]) -> dict[str, int]:
    """The sizes that the function takes, of those that were given."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except Exception:  # some functions written in C have no signature, and one of Python's own may raise
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
                "an entry point must take no arguments, or ranks= and microbatches=",
                f"{name} needs {parameter.name}",
                f"give {option}" if option else "give it a default",
            )
    return given


@contextmanager
def _reported(doing: str) -> Iterator[None]:
    """Any exception of the foreign code becomes bad input, ``SystemExit`` and other ``BaseException`` included."""
    try:
        yield
    except BaseException as error:
        raise RuleError(
            "an entry point must return a schedule without an error",
            f"{doing} {type(error).__name__}: {_first_line(error)} ({_where(error)})",
            "correct the function",
        ) from error


def _where(error: BaseException) -> str:
    """The innermost lines of the traceback, at most three, without those of this file and of the import system."""
    frames = [
        f"{frame.filename}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen ")
    ]
    return ", called from ".join(reversed(frames[-3:])) or "in no Python code"


def _first_line(error: BaseException) -> str:
    """The first line of an error's text; getting the text of a foreign error may itself raise."""
    try:
        return next(iter(str(error).splitlines()), "")
    except BaseException:
        return "(its text raised an error)"


def _text(label: str, item: Any) -> str:
    if isinstance(item, Schedule):
        with _reported(f"{label} is a Schedule whose text raised"):
            return dumps(item)
    if isinstance(item, str):
        return item
    if isinstance(item, Coroutine | AsyncIterable):
        if isinstance(item, Coroutine):
            item.close()  # else Python warns that nobody awaited it
        raise RuleError(
            "an entry point must be a function that is not async",
            f"{label} is async",
            "name a plain function, which may call asyncio.run",
        )
    raise RuleError(
        "an entry point must return a Schedule, the text of one, or an iterable of these",
        f"{label} is of type {type(item).__name__}",
        "use dualpipe.Schedule or dualpipe.loads",
    )
