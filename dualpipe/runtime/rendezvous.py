"""The ranks of a pipeline meet before its first message: they compare their set-ups and agree on a name.

They meet in the store of their process group, so that nothing is sent and no connection opened before all have come.
The first rank leads::

    key            written by        value
    come/RANK      that rank         its ticket, new at every attempt, and its record; empty once the leader has read it
    met/TICKET     the first rank    the name of this meeting; one key for each rank that came
    records/NAME   the first rank    everybody's records
    connected/...  each rank         that it is connected with all others

A ticket is used once, so an attempt that a rank gave up cannot be taken for the next one.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch.distributed import distributed_c10d as c10d

_FIRST_DELAY, _LONGEST_DELAY = 0.002, 0.05  # seconds between two looks into the store
_NOBODY = b"-"  # not every store can hold an empty value


class MissingRankError(RuntimeError):
    """Not all ranks came in time."""


@dataclass
class Rendezvous:
    """One attempt of group rank ``rank`` of ``ranks`` to meet the others; ``cancelled`` ends it early."""

    store: c10d.Store
    rank: int
    ranks: int
    cancelled: threading.Event = field(default_factory=threading.Event)

    def meet(self, record: Mapping[str, str], seconds: float) -> tuple[str, list[dict[str, str]]]:
        """The name of the meeting, and every rank's record by group rank.  Raises ``MissingRankError``."""
        deadline = time.monotonic() + seconds
        ticket = uuid.uuid4().hex
        self._set(f"come/{self.rank}", json.dumps([ticket, dict(record)]).encode())
        try:
            if self.rank == 0:
                self._lead(deadline)
            name = self._await([f"met/{ticket}"], deadline)[0].decode()
        except BaseException:
            self._set(f"come/{self.rank}", _NOBODY)
            raise
        return name, json.loads(self.store.get(f"records/{name}"))

    def confirm(self, name: str, seconds: float) -> None:
        """Wait until every rank of the meeting ``name`` is connected with all others.

        A rank that ended before would fail a slower one's connecting.  Raises ``MissingRankError``.
        """
        self._set(f"connected/{name}/{self.rank}", b"yes")
        self._await([f"connected/{name}/{rank}" for rank in range(self.ranks)], time.monotonic() + seconds)

    def _lead(self, deadline: float) -> None:
        got = self._await([f"come/{rank}" for rank in range(self.ranks)], deadline)
        for rank in range(self.ranks):
            self._set(f"come/{rank}", _NOBODY)
        name, read = uuid.uuid4().hex, [json.loads(value) for value in got]
        self._set(f"records/{name}", json.dumps([record for _, record in read]).encode())
        for ticket, _ in read:
            self._set(f"met/{ticket}", name.encode())

    def _await(self, keys: Sequence[str], deadline: float) -> list[bytes]:
        """The values of the keys once all are there."""
        values: dict[str, bytes] = {}
        delay = _FIRST_DELAY
        while True:
            for key in keys:
                if key not in values and self.store.check([key]) and (value := self.store.get(key)) != _NOBODY:
                    values[key] = value
            if len(values) == len(keys):
                return [values[key] for key in keys]
            if time.monotonic() > deadline or self.cancelled.wait(delay):
                absent = [key.rpartition("/")[2] for key in keys if key not in values and not key.startswith("met/")]
                raise MissingRankError(
                    f"rank {', '.join(absent)} of the group did not come" if absent else "not all ranks came"
                )
            delay = min(1.5 * delay, _LONGEST_DELAY)

    def _set(self, key: str, value: bytes) -> None:
        self.store.set(key, value)  # type: ignore[arg-type] # declared for str; bytes are what it stores
