"""A message in flight, or a batch of them, as its work that the program waits for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from .flow import Flow
from .log import call_path


class Pending(dist.Work):
    """Reports when the program waits for the messages, or learns in another way that they have completed.

    gloo completes a message only while somebody waits for it.  So a program that polls ``is_completed()`` starts a
    thread that waits on its behalf.
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
        """One work for the works of several messages."""
        there = [part for part in parts if part is not None]
        for part in there:
            in_flight.remove(part)
        works = [work for part in there for work in part._works]
        return cls(flow, works, [number for part in there for number in part._numbers], in_flight)

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
            self._flow.broke(error, "M", self._numbers)
            raise
        self._note_completed()
        return True

    def is_completed(self) -> bool:
        if self._completed:
            return True
        if self._waiter is None:
            self._waiter = threading.Thread(target=self._wait_apart, daemon=True)
            self._waiter.start()
        self._waiter.join(0.001)
        if self._waiter.is_alive():
            self._flow.poll(self._numbers)
            return False
        if self._error is not None:
            self._flow.broke(self._error, "M", self._numbers)
            raise self._error
        self._note_completed()
        return True

    def _wait_apart(self) -> None:
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
        if name in _OWN or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(super().__getattribute__("_works")[0], name)


_OWN = frozenset({name for name in vars(Pending) if not name.startswith("__")}) | {
    "_flow",
    "_works",
    "_numbers",
    "_in_flight",
    "_completed",
    "_waiter",
    "_error",
}
