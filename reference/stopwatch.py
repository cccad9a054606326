"""Measure when the ops of a rank ran and when the rank waited."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from dualpipe.runtime.transport import Message, Transport
from dualpipe.schedule import Op, Slot
from reference.trace import Interval, StepTimes


class Stopwatch:
    """The times of the current step."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.start()

    def start(self) -> None:
        self._ops: list[tuple[Op, Interval]] = []
        self._waits: dict[str, Interval] = {}

    def observe(self, slot: Slot, op: Op, began: float, ended: float) -> None:
        """A ``dualpipe.runtime.executor.Observer``."""
        self._ops.append((op, Interval(began, ended)))

    def waited(self, message: Message, began: float, ended: float) -> None:
        """Keep the first wait for a message; later waits return at once."""
        self._waits.setdefault(message.label, Interval(began, ended))

    def read(self) -> StepTimes:
        return StepTimes(tuple(self._ops), dict(self._waits))


class Timed:
    """A transport whose waits are timed; everything else is delegated."""

    def __init__(self, transport: Transport, watch: Stopwatch) -> None:
        self.rank, self.ranks = transport.rank, transport.ranks
        self._transport, self._watch = transport, watch

    def post(self, messages: Sequence[Message]) -> None:
        self._transport.post(messages)

    def wait(self, message: Message) -> Sequence[Tensor]:
        began = time.monotonic()
        tensors = self._transport.wait(message)
        self._watch.waited(message, began, time.monotonic())
        return tensors

    def drain(self) -> None:
        self._transport.drain()

    def agree(self, record: Mapping[str, str]) -> None:
        self._transport.agree(record)

    def phase(self, kind: str) -> AbstractContextManager[None]:
        return self._transport.phase(kind)

    def close(self) -> None:
        self._transport.close()
