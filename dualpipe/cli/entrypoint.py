"""``module:function``: a user's function that returns schedules.

The function runs in a process of its own (``dualpipe.schedule.entrypoint``), which returns text.  The schedule is
parsed from that text, as if read from a file, so foreign code can neither end this process nor change its modules.  If
the process ends without returning text, that is bad input.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dualpipe._imports import is_installed, own_path
from dualpipe.errors import RuleError
from dualpipe.schedule import Schedule
from dualpipe.schedule.text import loads

LIMIT_SECONDS = 60.0
"""Seconds that an entry point may take by default (``--entry-timeout``)."""
MOST_BYTES = 256 << 20
"""The most bytes of text that an entry point may return."""
_AFTERWARDS = 2.0
"""Seconds for the process to end once its text is written; then it is killed, with its threads and children."""
_LATE = 1.0
"""Seconds after the limit at which a process is killed that does not end itself."""
_POLL = 0.005
_LONGEST_ERROR = 2000

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_FRAME = re.compile(r'File "(.+)", line (\d+) in (.+)')
_START = """\
import sys
path = sys.path[:]
sys.path[:] = {path!r}
from dualpipe.schedule.entrypoint import serve
serve(*{arguments!r}, path)
"""


def is_entry_point(text: str) -> bool:
    """Whether a text has the form ``package.module:function``."""
    return _FORM.fullmatch(text) is not None


def call(name: str, ranks: int | None, microbatches: int | None, limit: float = LIMIT_SECONDS) -> list[Schedule]:
    """The schedules that an entry point returns: a ``Schedule``, the text of one, or an iterable of these.

    Whatever the foreign code prints goes to standard error; its standard input is empty.

    Parameters
    ----------
    name:
        ``module:function``.  The current directory comes first on the import path, as with ``python -m``.
    ranks, microbatches:
        Passed by keyword where the function has a parameter of that name and the value is not ``None``.
    limit:
        Seconds until the function has returned and its iterable is exhausted.

    Raises
    ------
    RuleError
        If the module or function does not exist, a parameter has no value, the function raises an error, its process
        ends or takes too long before it returns text, or the result is not a schedule.
    ScheduleSyntaxError
        For a text that is not a schedule; line and column refer to the text.
    """
    sizes = {"ranks": ranks, "microbatches": microbatches}
    with tempfile.TemporaryDirectory(prefix="dualpipe-entry-") as scratch:
        folder = Path(scratch)
        code = _run(folder, name, sizes, limit)
        answer = folder / "answer"
        if not answer.exists():
            raise RuleError("an entry point must return a schedule", *_ending(name, folder, code, limit))
        if answer.stat().st_size > MOST_BYTES:
            raise RuleError(
                f"an entry point may return at most {MOST_BYTES >> 20} MiB of text", f"{name} returned more", "split it"
            )
        texts = _texts(name, answer)
    labels = [f"{name}[{at}]" for at in range(len(texts))] if len(texts) > 1 else [name]
    return [loads(text, label) for label, text in zip(labels, texts, strict=True)]


def _run(folder: Path, name: str, sizes: dict[str, int | None], limit: float) -> int | None:
    """Run the process until its answer is written or it ends.  Returns its exit code, ``None`` if it was killed."""
    start = _START.format(path=own_path(sys.path), arguments=(str(folder), name, sizes, limit))
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", start],
        stdin=subprocess.DEVNULL,
        stdout=_standard_error(),
        start_new_session=True,
    )
    try:
        ends = time.monotonic() + limit + _LATE
        while process.poll() is None and time.monotonic() < ends:
            if (folder / "answer").exists():
                ends = min(ends, time.monotonic() + _AFTERWARDS)
            time.sleep(_POLL)
        return process.poll()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _standard_error() -> int:
    """The file descriptor to which the foreign code prints."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def _ending(name: str, folder: Path, code: int | None, limit: float) -> tuple[str, str]:
    """How a process ended that returned nothing, and how to fix that."""
    file = folder / "trace"
    trace = file.read_text(errors="replace") if file.exists() else ""
    if code is None or (code == 1 and trace.startswith("Timeout")):
        at = _innermost(trace)
        then = f"; at that moment it was at {at}" if at else ""
        return f"{name} had not returned after {limit:g} s{then}", "make it faster, or raise --entry-timeout"
    if code < 0:
        at = _innermost(trace)
        return f"{name} was killed by {_signal(-code)}{f' ({at})' if at else ''}", "correct the function"
    return f"{name} ended its process with exit code {code}", "have it return instead"


def _innermost(trace: str) -> str:
    """The innermost frame of the calling thread in the user's own files, from the trace of ``faulthandler``.

    If there is none, as while Python starts, the innermost frame of all.
    """
    threads = [thread for thread in re.split(r"\n(?=Thread |Current thread )", trace) if "in serve" in thread]
    frames = _FRAME.findall(threads[0] if threads else trace)
    own = [frame for frame in frames if not is_installed(frame[0])]
    return "{}:{}, in {}".format(*(own or frames)[0]) if frames else ""


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _texts(name: str, answer: Path) -> list[str]:
    """The texts of an answer.  Its form is checked, since foreign code may have written it or changed its writer."""
    try:
        content: Any = json.loads(answer.read_bytes())
        if set(content) == {"error"}:
            rule, got, fix = (_line(part) for part in content["error"])
        else:
            texts = content["texts"]
            if texts and isinstance(texts, list) and all(isinstance(text, str) for text in texts):
                return texts
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RuleError(
            "an entry point must return a schedule",
            f"{name} replaced the code that returns it",
            "leave dualpipe as it is",
        ) from error
    raise RuleError(rule, got, fix)


def _line(part: str) -> str:
    return part if len(part) <= _LONGEST_ERROR else part[: _LONGEST_ERROR - 1] + "…"
