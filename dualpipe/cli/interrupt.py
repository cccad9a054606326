"""How a command is interrupted: by Ctrl-C, even while a solver works, and by SIGTERM.

Python handles Ctrl-C between two of its own instructions, and one call of the solver can last minutes.  So the work
runs in a second thread while the first only waits, and Ctrl-C ends that wait at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

T = TypeVar("T")
_WAIT_SECONDS = 0.1
_workers: list[threading.Thread] = []


def interruptible(work: Callable[[], T]) -> T:
    """Return or raise what ``work`` does; on Ctrl-C abandon the work and raise ``KeyboardInterrupt`` at once.

    For work that calls a solver and starts no processes.  After the interrupt, exit with ``leave``.
    """
    import z3

    z3.set_param("ctrl_c", False)  # else Z3 handles the signal itself and answers "unknown"
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=run, daemon=True)
    _workers.append(worker)
    worker.start()
    while worker.is_alive():  # a signal just before a wait begins does not end it, so each wait is short
        worker.join(_WAIT_SECONDS)
    if errors:
        raise errors[0]
    return outcome[0]


class Terminated(SystemExit):
    """The exit on SIGTERM, which is distinct from any exit of foreign code."""


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise an exit with code 143, so that cleanup runs as it does for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def leave(code: int) -> NoReturn:
    """End the process, without waiting for abandoned work and without tearing the interpreter down around it."""
    if any(worker.is_alive() for worker in _workers):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
