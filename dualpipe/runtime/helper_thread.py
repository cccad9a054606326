"""Threads that wait in C++ on behalf of the main thread, which can then be interrupted."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

NO_TIMEOUT = timedelta(days=3650)
"""For waits of a helper thread, which end when the message completes or its process group is torn down."""


class HelperThread:
    """A daemon thread that runs one job after another.

    ``thread.on_behalf_of`` is the identifier of the thread that is waiting for its job, if one is.  The recorder reads
    it: what the helper waits for, that thread needs.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Any] = SimpleQueue()
        self.thread = threading.Thread(target=_run_all, args=(self._jobs,), name=name, daemon=True)
        self.thread.start()

    def submit(self, function: Any, *arguments: Any, caller_waits: bool = False) -> Future[Any]:
        """Call the function in the thread, after the jobs submitted before."""
        self.thread.on_behalf_of = threading.get_ident() if caller_waits else None  # type: ignore[attr-defined] # ours
        future: Future[Any] = Future()
        self._jobs.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Let the thread end once its jobs are done."""
        self._jobs.put(None)


def _run_all(jobs: SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        future, function, arguments = job
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)
        del job, future, function, arguments  # an idle thread must not keep the last job's tensors alive
