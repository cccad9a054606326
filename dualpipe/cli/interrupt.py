"""How a command ends before its time: by Ctrl-C, also while a solver works, and by SIGTERM.

Python tells of Ctrl-C between two of its own instructions, and one call of the solver can last minutes.  So the work
runs in a second thread, while the first does nothing but wait, which Ctrl-C ends at once.
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
    """What ``work`` returns or raises; ``KeyboardInterrupt`` as soon as Ctrl-C is pressed, the work then abandoned.

    For work that solves, and starts no processes: whoever gets the interrupt leaves by ``leave``.
    """
    import z3

    z3.set_param("ctrl_c", False)  # else Z3 takes the signal for itself and answers "unknown"
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
    while worker.is_alive():  # a signal that comes just before a wait begins does not end it, so no wait is long
        worker.join(_WAIT_SECONDS)
    if errors:
        raise errors[0]
    return outcome[0]


class Terminated(SystemExit):
    """SIGTERM came; no foreign code's own exit is of this class."""


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """While inside, SIGTERM leaves as Ctrl-C does, so that what has to be cleaned up is, with exit code 143."""
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
    """End the process; work that was abandoned does not keep it, nor does it see the interpreter go."""
    if any(worker.is_alive() for worker in _workers):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
