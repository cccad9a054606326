"""The announcements between the ranks of a pipeline: that a phase begins, that a rank has failed or ended.

A *phase* is one call that exchanges messages: a step, an evaluation, a reduction of gradients, a copy of weights.
When a rank begins a phase, it announces it to the next rank (the last rank to the first).  If any two ranks are in
different phases, two neighbours are, so this is enough to find out.  If a phase must not begin before all ranks are
there, each rank announces its presence to all others.  A rank that fails sends the reason to all others before it
closes its connections.  A thread for each other rank receives these announcements::

    received                              consequence
    the phase that this rank is in        none
    another phase                         this rank fails: one of the two left out a call
    the presence of that rank             a wait for this rank's presence ends
    a failure                             this rank fails with the same reason
    the end of that rank                  none
    an error: the connection is closed    messages with that rank fail, except sends to a rank that has ended

Nothing waits for an announcement, so they add no wait to those that were proved free of deadlock.

The pipeline has process groups of its own, which can be torn down without harm to the user's.
``ProcessGroup.abort`` does that for NCCL, and nothing for gloo (observed with torch 2.13).  On gloo a wait that times
out closes every connection of its group, so one is made to time out on purpose.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from dualpipe.runtime.helper_thread import NO_TIMEOUT, HelperThread

Edge = tuple[int, int]
"""Two pipeline ranks: messages go from the first to the second."""

_BYTES = 512
_PHASE, _FAILURE, _END, _PRESENT = 1, 2, 3, 4  # the first byte of an announcement
_CONTROL_TAG, _UNUSED_TAG = 0, 1  # of announcements; of a message that nobody sends
_FIRST_DATA_TAG = 2
_SECONDS_TO_NOTIFY = 5.0
_SECONDS_TO_END = 2.0


class Peers:
    """The other ranks of a pipeline: the connections to them, and what they have announced.

    Parameters
    ----------
    name:
        The name of the groups: the same on every rank, and new for each pipeline.
    parent:
        The user's group, which is not changed.
    order:
        ``order[r]`` is the group rank of pipeline rank ``r``.
    backend:
        The backend of the group for data.
    timeout:
        Seconds that connecting may take.
    edges:
        The directed edges, pairs of pipeline ranks, that get a group of their own; the same on every rank.
    """

    def __init__(
        self,
        name: str,
        parent: dist.ProcessGroup,
        order: Sequence[int],
        backend: str,
        timeout: float,
        edges: Iterable[Edge] = (),
    ) -> None:
        self.failure: str | None = None
        """Why this pipeline cannot go on, from whichever rank failed first."""
        self.disconnected: dict[int, str] = {}
        """The ranks whose connection is closed, with the error."""
        self.ended: set[int] = set()
        """The ranks that closed their pipeline without a failure, and so have received all that was sent to them."""
        self.phase = ""
        self._tag = _FIRST_DATA_TAG
        self._order, self._rank = list(order), list(order).index(parent.rank())
        self._others = [rank for rank in range(len(self._order)) if rank != self._rank]
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._begun = 0  # how many phases this rank has begun
        self._begun_before = 0  # how many the rank before this one has begun
        self._mine: dict[int, str] = {}  # this rank's phases that the rank before has not begun
        self._ahead: dict[int, str] = {}  # its phases that this rank has not begun
        self._present = dict.fromkeys(self._others, 0)  # the phase in which each rank has last announced its presence
        self._notified = self._closed = False
        self._helpers: list[HelperThread] = []
        everyone = range(parent.size())
        self.data = _new_group(name, parent, everyone, backend, timeout)
        self.edges: dict[Edge, dist.ProcessGroup] = {}
        """The groups of this rank's own edges, of two ranks each."""
        for edge in sorted(edges):  # one order for all ranks: each waits for the other end
            if self._rank in edge:
                members = sorted(self._order[rank] for rank in edge)
                named = f"{name}-from-{edge[0]}-to-{edge[1]}"
                self.edges[edge] = _new_group(named, parent, members, backend, timeout)
        self._control = self.data
        if backend != "gloo":
            self._control = _new_group(f"{name}-control", parent, everyone, "gloo", timeout)
        self._announcer = self.helper("dualpipe-announcements")
        for rank in self._others:
            self.helper(f"dualpipe-rank-{rank}").submit(self._listen, rank)

    @property
    def tag(self) -> int:
        """The tag of this phase's messages.

        Two ranks in different phases have different tags, as gloo ends a process that gets a longer message than it
        expects.
        """
        return self._tag

    def helper(self, name: str) -> HelperThread:
        """A helper thread that ends with this object."""
        self._helpers.append(HelperThread(name))
        return self._helpers[-1]

    def begin(self, phase: str) -> None:
        """Announce this rank's next phase to the next rank.  Raises ``RuntimeError`` if the one before is elsewhere."""
        ranks = len(self._order)
        with self._changed:
            self._begun += 1
            self.phase = phase
            self._tag = _FIRST_DATA_TAG + crc32(f"{self._begun} {phase}".encode()) % 2**30
            theirs = self._ahead.pop(self._begun, None)
            if self._begun > self._begun_before:
                self._mine[self._begun] = phase
        if ranks > 1:
            self._announcer.submit(self._announce, _encode(_PHASE, phase), [(self._rank + 1) % ranks])
        if theirs not in (None, phase):
            raise RuntimeError(self._describe_difference(phase, (self._rank - 1) % ranks, str(theirs)))

    def announce_presence(self) -> None:
        """Announce to all others that this rank is in its phase."""
        if self._others:
            self._announcer.submit(self._announce, _encode(_PRESENT, str(self._begun)), self._others)

    def wait_until_present(self, ranks: Sequence[int], seconds: float) -> None:
        """Wait until these ranks have announced their presence in this rank's phase, or a later one.

        Raises ``RuntimeError`` if one does not.
        """
        deadline = time.monotonic() + seconds
        with self._changed:
            for rank in ranks:
                while self._present[rank] < self._begun and self.failure is None:
                    if rank in self.disconnected:
                        raise RuntimeError(f"rank {rank} did not begin {self.phase}: {self.disconnected[rank]}")
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                        raise RuntimeError(f"rank {rank} did not begin {self.phase} within {seconds:g} s")
            if self.failure is not None:
                raise RuntimeError(self.failure)

    def reason(self, rank: int) -> str | None:
        """Why messages with ``rank`` fail.  Waits a moment for the announcement or the end of the connection."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or rank in self.disconnected, _SECONDS_TO_NOTIFY)
            return self.failure or self.disconnected.get(rank)

    def fail(self, reason: str) -> None:
        """Record the failure, notify all others and close the connections.  The first reason counts."""
        with self._changed:
            self.failure = self.failure or reason
            first, self._notified = not self._notified, True
            self._changed.notify_all()
        if first and not self._closed:
            self._notify(_encode(_FAILURE, self.failure))
            if self.data is not self._control:
                for group in (self.data, *self.edges.values()):
                    group.abort()
            self._disconnect()

    def close(self) -> None:
        """End the threads and the groups.  A second call does nothing, nor does one in a forked child."""
        with self._changed:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
        if self.failure is None:
            self._notify(_encode(_END, ""))
        for helper in self._helpers:
            helper.close()
        self._disconnect()
        deadline = time.monotonic() + _SECONDS_TO_END
        for helper in self._helpers:
            if helper.thread is not threading.current_thread():
                helper.thread.join(max(0.0, deadline - time.monotonic()))
        for group in dict.fromkeys([*self.edges.values(), self.data, self._control]):
            if c10d._world.pg_map.get(group) is not None:  # the user may have destroyed all groups
                dist.destroy_process_group(group)

    def _listen(self, rank: int) -> None:
        """Receive the announcements of one rank until its connection is closed; runs in that rank's helper thread."""
        received = torch.zeros(_BYTES, dtype=torch.uint8)
        while True:
            try:
                self._control.recv([received], self._order[rank], _CONTROL_TAG).wait(NO_TIMEOUT)
            except RuntimeError as error:
                with self._changed:
                    self.disconnected[rank] = str(error).strip() or "its connection is closed"
                    self._changed.notify_all()
                return
            kind, text = _decode(received)
            if kind == _FAILURE:
                self.fail(text)
                return
            if kind == _END:
                self.ended.add(rank)
                continue
            with self._changed:
                if kind == _PRESENT:
                    self._present[rank] = int(text)
                    self._changed.notify_all()
                    continue
                self._begun_before += 1
                if self._begun_before > self._begun:
                    self._ahead[self._begun_before] = text
                mine = self._mine.pop(self._begun_before, text)
            if mine != text:
                self.fail(self._describe_difference(mine, rank, text))

    def _describe_difference(self, mine: str, rank: int, theirs: str) -> str:
        return (
            f"all ranks make the same calls in the same order: rank {self._rank} began {mine} where rank {rank} began "
            f"{theirs}; see which call one of them left out or made twice"
        )

    def _announce(self, announcement: Tensor, ranks: Sequence[int]) -> None:
        for work in self._send(announcement, ranks):
            try:
                work.wait(NO_TIMEOUT)
            except RuntimeError:  # that rank has ended; a message that needs it raises the error
                continue

    def _notify(self, announcement: Tensor) -> None:
        """Send the last announcement; a rank that does not take it in time misses it."""
        deadline = time.monotonic() + _SECONDS_TO_NOTIFY
        for work in self._send(announcement, self._others):
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError:
                continue

    def _send(self, announcement: Tensor, ranks: Sequence[int]) -> list[dist.Work]:
        works = []
        for rank in ranks:
            try:
                works.append(self._control.send([announcement], self._order[rank], _CONTROL_TAG))
            except RuntimeError:
                continue
        return works

    def _disconnect(self) -> None:
        """Close the connections of the gloo groups, which ends every wait on them, here and on the other ranks."""
        ends = [(self._control, self._order[rank]) for rank in self._others]
        if self.data is self._control:
            ends += [(group, 1 - group.rank()) for group in self.edges.values()]
        nothing = torch.zeros(1, dtype=torch.uint8)
        for group, other in ends:
            try:
                group.recv([nothing], other, _UNUSED_TAG).wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue


def _new_group(
    name: str, parent: dist.ProcessGroup, members: Sequence[int], backend: str, timeout: float
) -> dist.ProcessGroup:
    """A group of some of the parent's ranks, in ascending order.

    ``dist.new_group`` has to be called by every process of the job, or names the group by how many groups the process
    has, which differs between ranks.  This makes the call that ``new_group`` makes, with a name of our own.
    """
    everyone = dist.get_process_group_ranks(parent)
    ranks = [everyone[member] for member in members]
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        members.index(parent.rank()),
        ranks,
        dist.Backend(backend),
        c10d._get_process_group_store(parent),
        name,  # type: ignore[arg-type] # a NewType of str in newer versions
        timeout=timedelta(seconds=max(1.0, timeout)),
        group_desc="DUALPIPE",
    )
    c10d._world.pg_group_ranks[group] = {rank: position for position, rank in enumerate(ranks)}
    made: dist.ProcessGroup = group
    return made


def _encode(kind: int, text: str) -> Tensor:
    data = text.encode()[: _BYTES - 1].decode(errors="ignore").encode()
    return torch.frombuffer(bytearray(bytes([kind]) + data.ljust(_BYTES - 1, b"\0")), dtype=torch.uint8)


def _decode(announcement: Tensor) -> tuple[int, str]:
    data = announcement.numpy().tobytes()
    return data[0], data[1:].rstrip(b"\0").decode()
