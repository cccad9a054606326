"""Before their first message the ranks of a pipeline compare their set-ups and agree on a name for their connections.

They use the store of their process group, so no message is sent and no connection opened until all have arrived.
The first rank leads::

    key            written by        value
    come/RANK      that rank         its ticket, new at every attempt, and its record; empty once the leader has read it
    met/TICKET     the first rank    the name of this meeting; one key for each rank that arrived
    records/NAME   the first rank    the records of all ranks
    connected/...  each rank         that it is connected to all others

A ticket is used once, so an attempt that a rank gave up cannot be mistaken for the next one.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from dualpipe.runtime.helper_thread import HelperThread
from dualpipe.runtime.transport import DisagreementError, first_sentence

_FIRST_DELAY, _LONGEST_DELAY = 0.002, 0.05  # seconds between two polls of the store
_NOBODY = b"-"  # not every store can hold an empty value
_LONGEST_SHOWN = 400  # characters of a value that differs


class MissingRankError(RuntimeError):
    """A rank did not arrive in time."""


class Rendezvous:
    """One attempt of this rank to meet the other ranks of ``parent``; ``order[r]`` is the group rank of rank ``r``.

    A context manager.  A helper thread does the work, so that the main thread can be interrupted.  Raises
    ``DisagreementError`` if the ranks differ, or if one does not arrive within ``timeout`` seconds.
    """

    def __init__(self, parent: dist.ProcessGroup, order: Sequence[int], timeout: float) -> None:
        self._store = c10d.PrefixStore("dualpipe", c10d._get_process_group_store(parent))
        self._rank, self._order, self._timeout = dist.get_rank(parent), order, timeout
        self._cancelled = threading.Event()
        self._helper = HelperThread("dualpipe-rendezvous")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._cancelled.set()
        self._helper.close()
        if isinstance(error, (MissingRankError, dist.DistError, TimeoutError)):
            rank = self._order.index(self._rank)
            reason = first_sentence(error) if str(error) else "one of them has not connected"
            raise DisagreementError(
                f"every rank compares its set-up with the others' before the first message: rank {rank} waited "
                f"{self._timeout:g} s for all of them ({reason}); see the logs of the others"
            ) from error

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function in the helper thread; it has the same timeout itself."""
        return self._helper.submit(function, *arguments).result(self._timeout + 1.0)

    def compare(self, record: Mapping[str, str]) -> str:
        """Compare the ranks' records, each entry among those that have it.  Returns the name of the meeting."""
        name, records = self.run(self._meet, record)
        _require_same([records[position] for position in self._order])
        return str(name)

    def confirm(self, name: str) -> None:
        """Wait until every rank of the meeting ``name`` is connected to all others.

        Otherwise a rank that ends early would break the connecting of a slower one.
        """
        self._set(f"connected/{name}/{self._rank}", b"yes")
        keys = [f"connected/{name}/{rank}" for rank in range(len(self._order))]
        self.run(self._await, keys, time.monotonic() + self._timeout)

    def _meet(self, record: Mapping[str, str]) -> tuple[str, list[dict[str, str]]]:
        """The name of the meeting, and every rank's record by group rank.  Raises ``MissingRankError``."""
        deadline = time.monotonic() + self._timeout
        ticket = uuid.uuid4().hex
        self._set(f"come/{self._rank}", json.dumps([ticket, dict(record)]).encode())
        try:
            if self._rank == 0:
                self._lead(deadline)
            name = self._await([f"met/{ticket}"], deadline)[0].decode()
        except BaseException:
            self._set(f"come/{self._rank}", _NOBODY)
            raise
        return name, json.loads(self._store.get(f"records/{name}"))

    def _lead(self, deadline: float) -> None:
        values = self._await([f"come/{rank}" for rank in range(len(self._order))], deadline)
        for rank in range(len(self._order)):
            self._set(f"come/{rank}", _NOBODY)
        name, arrived = uuid.uuid4().hex, [json.loads(value) for value in values]
        self._set(f"records/{name}", json.dumps([record for _, record in arrived]).encode())
        for ticket, _ in arrived:
            self._set(f"met/{ticket}", name.encode())

    def _await(self, keys: Sequence[str], deadline: float) -> list[bytes]:
        """The values of the keys once all are there."""
        values: dict[str, bytes] = {}
        delay = _FIRST_DELAY
        while True:
            for key in keys:
                if key not in values and self._store.check([key]) and (value := self._store.get(key)) != _NOBODY:
                    values[key] = value
            if len(values) == len(keys):
                return [values[key] for key in keys]
            if time.monotonic() > deadline or self._cancelled.wait(delay):
                absent = [key.rpartition("/")[2] for key in keys if key not in values and not key.startswith("met/")]
                who = f"rank {', '.join(absent)} of the group" if absent else "a rank of the group"
                raise MissingRankError(f"{who} did not arrive")
            delay = min(1.5 * delay, _LONGEST_DELAY)

    def _set(self, key: str, value: bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type] # declared for str, but it stores bytes


def _require_same(records: Sequence[Mapping[str, str]]) -> None:
    """Compare each entry among the ranks that have it; ``records`` are in order of rank.

    Raises ``DisagreementError`` with the values of the first entry that differs.
    """
    for name in dict.fromkeys(name for record in records for name in record):
        ranks_of: dict[str, list[int]] = {}
        for rank, record in enumerate(records):
            if name in record:
                ranks_of.setdefault(record[name], []).append(rank)
        if len(ranks_of) > 1:
            shown = "; ".join(f"{_ranks_have(ranks)} {_excerpt(value, ranks_of)}" for value, ranks in ranks_of.items())
            raise DisagreementError(f"every rank runs with the same {name}: {shown}; set all ranks up in the same way")


def _excerpt(value: str, values: Mapping[str, Any]) -> str:
    """The value; if one of ``values`` is long, the part around their first difference."""
    if all(len(other) <= _LONGEST_SHOWN for other in values):
        return value
    first = next((at for at, letters in enumerate(zip(*values, strict=False)) if len(set(letters)) > 1), None)
    start = max(0, (min(map(len, values)) if first is None else first) - _LONGEST_SHOWN // 4)
    end = start + _LONGEST_SHOWN
    return f"{'... ' if start else ''}{value[start:end]}{' ...' if end < len(value) else ''}"


def _ranks_have(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
