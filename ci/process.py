"""Runs a command with a time limit; neither it nor any process it started outlives the call."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ci import git

_RUNNING: set[subprocess.Popen[str]] = set()
_ENDING = threading.Event()
_LOCK = threading.Lock()
"""Guards both.  They belong to the module because a signal ends the whole process."""


class EndingError(RuntimeError):
    """A command is not started because the gate is ending."""


@dataclass(frozen=True)
class Completed:
    """A command that ended.  ``code`` is ``None`` if it exceeded its time limit."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line that it wrote to standard error, or else to standard output; the error, after a traceback."""
        for text in (self.err, self.out):
            lines = [line for line in text.splitlines() if line.strip()]
            if lines:
                return lines[-1].strip()
        return "it printed nothing"


def run(command: Sequence[str], root: Path, limit: float, tree: Path | None = None, stdin: str = "") -> Completed:
    """Run ``command`` in ``root``.

    Parameters
    ----------
    limit:
        Seconds after which the command and its children are killed.
    tree:
        The source tree that Python imports from; ``root`` if ``None``.
    stdin:
        Text for its standard input.

    Raises ``EndingError`` after ``end_all``.
    """
    started = time.monotonic()
    with _LOCK:
        if _ENDING.is_set():
            raise EndingError(f"{command[0]} is not started: the gate is ending")
        process = subprocess.Popen(
            command,
            cwd=root,
            env={**git.environment(), **environment(root if tree is None else tree)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        _RUNNING.add(process)
    try:
        out, err = process.communicate(stdin, timeout=limit)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        code = None
        _end(process)
        out, err = process.communicate()
    except BaseException:
        _end(process)
        raise
    finally:
        with _LOCK:
            _RUNNING.discard(process)
    return Completed(code, out, err, time.monotonic() - started)


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this interpreter."""
    return (sys.executable, *arguments)


def environment(tree: Path) -> Mapping[str, str]:
    """The environment of every check: only this tree, one thread per process, no stale byte code, no colours."""
    return {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "NO_COLOR": "1",
    }


def end_all() -> None:
    """Kill every running command with all that it started, and start no other; for a gate that is interrupted."""
    with _LOCK:
        _ENDING.set()
        for process in _RUNNING:
            _end(process)


def raise_on_termination() -> None:
    """Let SIGTERM end this process like Ctrl-C, so that its children are stopped too; ignore a second SIGTERM."""

    def terminated(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, terminated)


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the command with all that it started: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
