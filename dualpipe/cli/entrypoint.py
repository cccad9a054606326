"""``module:function``: a function of somebody's own that returns schedules.

The function runs in a process of its own (``dualpipe.schedule.entrypoint``), which hands back text.  What is proved is
the schedule parsed from that text, as if it had been read from a file, and nothing that the foreign code does can end
this process or change a module of it.  Whatever ends without handing back text is bad input.
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
"""How long an entry point may take unless ``--entry-timeout`` says otherwise."""
MOST_BYTES = 256 << 20
"""Of text that an entry point may hand back."""
_AFTERWARDS = 2.0
"""Seconds for the process to end once its text is there; then it is killed, threads and children included."""
_LATE = 1.0
"""Seconds by which a process that cannot end itself is killed after its limit."""
_POLL = 0.005
_LONGEST_COMPLAINT = 2000

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

    What the foreign code prints goes to standard error; its standard input is empty.

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
        For a module or function that is not there, parameters that cannot be filled, an error of the function's
        own, a process that ends or takes too long before it hands back text, and a result that is something else.
    ScheduleSyntaxError
        For a text that is no schedule; line and column are those of the text.
    """
    sizes = {"ranks": ranks, "microbatches": microbatches}
    with tempfile.TemporaryDirectory(prefix="dualpipe-entry-") as scratch:
        folder = Path(scratch)
        code = _run(folder, name, sizes, limit)
        answer = folder / "answer"
        if not answer.exists():
            raise RuleError("an entry point returns a schedule", *_ending(name, folder, code, limit))
        if answer.stat().st_size > MOST_BYTES:
            raise RuleError(
                f"an entry point returns at most {MOST_BYTES >> 20} MiB of text", f"{name} returned more", "split it"
            )
        texts = _texts(name, answer)
    labels = [f"{name}[{at}]" for at in range(len(texts))] if len(texts) > 1 else [name]
    return [loads(text, label) for label, text in zip(labels, texts, strict=True)]


def _run(folder: Path, name: str, sizes: dict[str, int | None], limit: float) -> int | None:
    """Run the process until its answer is there or it has ended; its exit code, ``None`` if it was killed here."""
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
    """The file descriptor for what the foreign code prints."""
    try:
        os.fstat(2)
    except OSError:
        return subprocess.DEVNULL
    return 2


def _ending(name: str, folder: Path, code: int | None, limit: float) -> tuple[str, str]:
    """What became of a process that handed back nothing, and what to do."""
    trace = folder / "trace"
    told = trace.read_text(errors="replace") if trace.exists() else ""
    if code is None or (code == 1 and told.startswith("Timeout")):
        at = _place(told)
        then = f"; at that moment it was at {at}" if at else ""
        return f"{name} had not returned after {limit:g} s{then}", "make it faster, or raise --entry-timeout"
    if code < 0:
        at = _place(told)
        return f"{name} was ended by {_signal(-code)}{f' ({at})' if at else ''}", "correct it"
    return f"{name} ended its process with exit code {code}", "have it return instead"


def _place(told: str) -> str:
    """Where the calling thread was, from what ``faulthandler`` wrote: its innermost frame in a file of the user's own.

    If none is, as while Python starts or a module of somebody else's is called without one, the innermost of all.
    """
    threads = [thread for thread in re.split(r"\n(?=Thread |Current thread )", told) if "in serve" in thread]
    frames = _FRAME.findall(threads[0] if threads else told)
    own = [frame for frame in frames if not is_installed(frame[0])]
    return "{}:{}, in {}".format(*(own or frames)[0]) if frames else ""


def _signal(number: int) -> str:
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _texts(name: str, answer: Path) -> list[str]:
    """The texts of an answer.  Foreign code may have written it, or changed what did, so its form is checked."""
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
            "an entry point returns a schedule", f"{name} replaced what hands it back", "leave dualpipe as it is"
        ) from error
    raise RuleError(rule, got, fix)


def _line(part: str) -> str:
    return part if len(part) <= _LONGEST_COMPLAINT else part[: _LONGEST_COMPLAINT - 1] + "…"
