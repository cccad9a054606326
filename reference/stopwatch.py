"""When a rank's ops began and ended, and when it waited: what ``dualpipe verify --trace`` keeps of a step."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dualpipe.runtime.transport import Message, Transport
from dualpipe.schedule import Op, Slot


class Stretch(NamedTuple):
    """From when to when, in seconds of ``time.monotonic``, one clock for all processes of a Linux machine."""

    start: float
    end: float


@dataclass(frozen=True)
class StepTimes:
    """One step of one rank: each op in program order, and for each receive that was waited for, by label, the wait.

    A message op lasts as long as posting its slot takes; a compute op includes its waits.
    """

    ops: tuple[tuple[Op, Stretch], ...]
    waits: Mapping[str, Stretch]


class Stopwatch:
    """Keeps the times of the step that runs."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.start()

    def start(self) -> None:
        self._ops: list[tuple[Op, Stretch]] = []
        self._waits: dict[str, Stretch] = {}

    def observe(self, slot: Slot, op: Op, began: float, ended: float) -> None:
        """An ``dualpipe.runtime.executor.Observer``."""
        self._ops.append((op, Stretch(began, ended)))

    def waited(self, message: Message, began: float, ended: float) -> None:
        """The first wait for a message counts: later ones find it there."""
        self._waits.setdefault(message.label, Stretch(began, ended))

    def read(self) -> StepTimes:
        return StepTimes(tuple(self._ops), dict(self._waits))


class Timed:
    """A transport whose waits are timed; all else is the transport's own."""

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
