"""The ``dist.Work`` that the program gets for a message in flight, or for a batch of messages."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from .flow import Flow
from .log import call_path


class Pending(dist.Work):
    """Stands for the works of the transport, and logs when the program waits for them or sees that they completed.

    ``numbers`` are the numbers of the messages in the log.  ``in_flight`` is the rank's list of works that have not
    completed; this one adds and removes itself.

    gloo completes a message only while a thread waits for it.  So ``is_completed()`` starts a thread that waits, for
    programs that poll.
    """

    def __init__(self, flow: Flow, works: Sequence[Any], numbers: Sequence[int], in_flight: list[Pending]) -> None:
        super().__init__()
        self._flow, self._works, self._numbers, self._in_flight = flow, works, numbers, in_flight
        self._completed = False
        self._waiter: threading.Thread | None = None
        self._error: BaseException | None = None
        in_flight.append(self)

    @classmethod
    def of(cls, flow: Flow, parts: Sequence[Pending | None], in_flight: list[Pending]) -> Pending:
        """One work in place of several, each of one or more messages; ``None`` means no message."""
        present = [part for part in parts if part is not None]
        for part in present:
            in_flight.remove(part)
        works = [work for part in present for work in part._works]
        return cls(flow, works, [number for part in present for number in part._numbers], in_flight)

    def wait(self, *args: Any, **kwargs: Any) -> bool:
        if self._completed:
            return True
        self._flow.write("wait", messages=list(self._numbers), own=self._flow.on_own_thread())
        try:
            if self._waiter is None:
                for work in self._works:
                    work.wait(*args, **kwargs)
            else:
                self._waiter.join()
                if self._error is not None:
                    raise self._error
        except BaseException as error:
            self._flow.note_error(error, "M", self._numbers)
            raise
        self._note_completed()
        return True

    def is_completed(self) -> bool:
        if self._completed:
            return True
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._wait_in_thread, daemon=True)
            self._waiter.start()
        self._waiter.join(0.001)  # seconds: lets the thread run, even if the program polls without a pause
        if self._waiter.is_alive():
            self._flow.poll(self._numbers)
            return False
        if self._error is not None:
            self._flow.note_error(self._error, "M", self._numbers)
            raise self._error
        self._note_completed()
        return True

    def _wait_in_thread(self) -> None:
        try:
            for work in self._works:
                work.wait()
        except BaseException as error:
            self._error = error

    def is_success(self) -> bool:
        return self._completed and self._error is None

    def result(self) -> Any:
        return [tensor for work in self._works for tensor in work.result()]

    def synchronize(self) -> None:
        self.wait()

    def _note_completed(self) -> None:
        if not self._completed:
            self._completed = True
            self._in_flight.remove(self)
            self._flow.buffers.completed(self._numbers)
            self._flow.write("completed", messages=list(self._numbers), at=call_path())

    def __getattribute__(self, name: str) -> Any:
        """Take every attribute that is not defined here from the transport's first work, as ``dist.Work`` has them."""
        if name in _OWN or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(super().__getattribute__("_works")[0], name)


# the attributes that are not passed on to the transport's work
_OWN = frozenset({name for name in vars(Pending) if not name.startswith("__")}) | {
    "_flow",
    "_works",
    "_numbers",
    "_in_flight",
    "_completed",
    "_waiter",
    "_error",
}
