"""Threads that wait in C++ on behalf of the main thread, which can then be interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

NO_TIMEOUT = timedelta(days=3650)
"""For the waits of a helper thread: they end when the message completes or its process group is torn down."""


class Job:
    """A call that a helper thread makes, and its result or exception.

    A lock suffices: ``concurrent.futures.Future`` takes several times as long, and each message would pay it twice.
    """

    __slots__ = ("_arguments", "_error", "_function", "_running", "_value")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._value: Any = None
        self._error: BaseException | None = None
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """Make the call.  The helper thread does so, once."""
        try:
            self._value = self._function(*self._arguments)
        except BaseException as error:
            self._error = error
        del self._function, self._arguments  # a finished job must not keep its tensors alive
        self._running.release()

    def done(self) -> bool:
        return not self._running.locked()

    def wait(self, seconds: float) -> bool:
        """Wait until the call has ended; whether it has.  One thread may wait at a time."""
        ended = self._running.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))
        if ended:
            self._running.release()
        return ended

    def result(self, seconds: float) -> Any:
        """The result of the call.  Raises the call's exception, or ``TimeoutError``.  One thread may wait at a time."""
        if not self.wait(seconds):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._value


class HelperThread:
    """A daemon thread that runs one job after another.

    ``thread.on_behalf_of`` is the identifier of the thread that is waiting for its job, if one is.  The recorder reads
    it: what the helper waits for, that thread needs.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.thread = threading.Thread(target=_run_all, args=(self._jobs,), name=name, daemon=True)
        self.thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any, caller_waits: bool = False) -> Job:
        """Call the function in the thread, after the jobs submitted before."""
        self.thread.on_behalf_of = threading.get_ident() if caller_waits else None  # type: ignore[attr-defined] # ours
        job = Job(function, arguments)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Let the thread end once its jobs are done."""
        self._jobs.put(None)


def _run_all(jobs: SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # an idle thread must not keep the last job's result alive
