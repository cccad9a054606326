"""What the ranks of a pipeline tell each other beside their data: which phase begins, and that a rank has failed.

A *phase* is one call that exchanges messages: a step, an evaluation, a reduction of gradients, a copy of weights.
Every rank announces each of its phases to all others as it begins, and a rank that fails says so, with the reason,
before it closes its connections.  A thread for each other rank listens::

    it hears                              then
    the phase that this rank is in        nothing
    another phase                         this rank fails: one of the two left out a call
    that the rank has failed              this rank fails with the same reason
    that the rank has ended               nothing
    that the connection is closed         what needs that rank fails, except sends to a rank that has ended

Nothing waits for an announcement, so these messages add no wait to those that were proved free of deadlock.

The messages go over process groups that the pipeline has for itself, so that they can be torn down without harm to the
user's.  ``ProcessGroup.abort`` does that for NCCL, and nothing for gloo (seen with torch 2.13); there a wait that times
out closes every connection of its group, so one is made to time out on purpose.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

FOR_EVER = timedelta(days=3650)
"""The timeout of a wait that ends by its message or with the process group."""
_BYTES = 512
_PHASE, _FAILURE, _END = 1, 2, 3  # the first byte of a message
_CONTROL_TAG, _NO_TAG = 0, 1  # of the announcements; of a message that nobody sends
FIRST_DATA_TAG = 2
_SECONDS_TO_TELL = 1.0
_SECONDS_TO_END = 2.0


class Job:
    """A call that a helper thread makes: what it returns or raises, once it has ended.

    A lock is all that it needs: a ``concurrent.futures.Future`` takes several times as long, twice for each message.
    """

    __slots__ = ("_arguments", "_ended", "_error", "_function", "_value")

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._function, self._arguments = function, arguments
        self._value: Any = None
        self._error: BaseException | None = None
        self._ended = threading.Lock()
        self._ended.acquire()

    def run(self) -> None:
        """Make the call; done by the helper thread, once."""
        try:
            self._value = self._function(*self._arguments)
        except BaseException as error:
            self._error = error
        self._function, self._arguments = _nothing, ()  # it must not hold what it was given
        self._ended.release()

    def ended(self) -> bool:
        return not self._ended.locked()

    def result(self, seconds: float) -> Any:
        """What the call returned; raises what it raised, or ``TimeoutError``.  One thread waits at a time."""
        if not self._ended.acquire(timeout=min(seconds, threading.TIMEOUT_MAX)):
            raise TimeoutError
        self._ended.release()
        if self._error is not None:
            raise self._error
        return self._value


def _nothing() -> None:
    """What an ended job calls."""


class Finisher:
    """A daemon thread that waits in C++ for one piece of work after the other, so that its owner can be interrupted.

    ``on_behalf_of`` is the thread that waits for it at this moment, if one does.
    """

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.thread = threading.Thread(target=_finish_all, args=(self._jobs,), name=name, daemon=True)
        self.thread.start()

    def submit(self, function: Callable[..., Any], *arguments: Any, waited_for: bool = False) -> Job:
        """Call the function in the thread, after what was submitted before."""
        self.thread.on_behalf_of = threading.get_ident() if waited_for else None  # type: ignore[attr-defined] # ours
        job = Job(function, arguments)
        self._jobs.put(job)
        return job

    def close(self) -> None:
        """Let the thread end once its work is done."""
        self._jobs.put(None)


def _finish_all(jobs: SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job  # a thread that waits for the next one must not hold this one's tensors


class Peers:
    """The other ranks of a pipeline, as this one knows them.

    Parameters
    ----------
    name:
        Of the groups; the same on every rank, and new for each pipeline.
    parent:
        The user's group, which is left as it is.
    order:
        ``order[r]`` is the group rank of pipeline rank ``r``.
    backend:
        Of the group for data.
    timeout:
        Seconds that connecting may take.
    """

    def __init__(
        self, name: str, parent: dist.ProcessGroup, order: Sequence[int], backend: str, timeout: float
    ) -> None:
        self.failure: str | None = None
        """Why this pipeline cannot go on, from whichever rank failed first."""
        self.gone: dict[int, str] = {}
        """The ranks whose connection is closed, with the error."""
        self.ended: set[int] = set()
        """The ranks that closed their pipeline without a failure, and so have received all that was sent to them."""
        self.phase = ""
        self._order, self._rank = list(order), list(order).index(parent.rank())
        self._others = [rank for rank in range(len(self._order)) if rank != self._rank]
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._begun = 0  # phases of this rank
        self._heard = dict.fromkeys(self._others, 0)  # phases of the others
        self._mine: dict[int, str] = {}  # this rank's phases that some rank has not begun
        self._ahead: dict[int, dict[int, str]] = {rank: {} for rank in self._others}  # theirs that this one has not
        self._told = self._closed = False
        self._finishers: list[Finisher] = []
        self.data = _new_group(name, parent, backend, timeout)
        self._control = self.data if backend == "gloo" else _new_group(f"{name}-control", parent, "gloo", timeout)
        self._announcer = self.finisher("dualpipe-announcements")
        for rank in self._others:
            self.finisher(f"dualpipe-rank-{rank}").submit(self._listen, rank)

    @property
    def tag(self) -> int:
        """The tag of this phase's messages."""
        return FIRST_DATA_TAG + self._begun % 2**20

    def finisher(self, name: str) -> Finisher:
        """A helper thread that ends with this object."""
        self._finishers.append(Finisher(name))
        return self._finishers[-1]

    def begin(self, phase: str) -> None:
        """Announce this rank's next phase to all others.  Raises ``RuntimeError`` if one of them began another."""
        with self._changed:
            self._begun += 1
            self.phase = self._mine[self._begun] = phase
            for number in [number for number in self._mine if number <= min(self._heard.values(), default=self._begun)]:
                if number < self._begun:
                    del self._mine[number]
            ahead = {rank: theirs.pop(self._begun, phase) for rank, theirs in self._ahead.items()}
        if self._others:
            self._announcer.submit(self._announce, _message(_PHASE, phase))
        for rank, theirs in ahead.items():
            if theirs != phase:
                raise RuntimeError(self._differ(phase, rank, theirs))

    def meet(self, ranks: Sequence[int], seconds: float) -> None:
        """Wait until these ranks have begun this rank's phase.  Raises ``RuntimeError`` where one does not."""
        deadline = time.monotonic() + seconds
        with self._changed:
            for rank in ranks:
                while self._heard[rank] < self._begun and self.failure is None:
                    if rank in self.gone:
                        raise RuntimeError(f"rank {rank} did not begin {self.phase}: {self.gone[rank]}")
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                        raise RuntimeError(f"rank {rank} did not begin {self.phase} within {seconds:g} s")
            if self.failure is not None:
                raise RuntimeError(self.failure)

    def why(self, rank: int) -> str | None:
        """Why messages with ``rank`` fail, once its last words were heard."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or rank in self.gone, _SECONDS_TO_TELL)
            return self.failure or self.gone.get(rank)

    def fail(self, reason: str) -> None:
        """Note the failure, tell all others and close the connections.  The first reason counts."""
        with self._changed:
            self.failure = self.failure or reason
            first, self._told = not self._told, True
            self._changed.notify_all()
        if first and not self._closed:
            self._tell(_message(_FAILURE, self.failure))
            if self.data is not self._control:
                self.data.abort()
            self._disconnect()

    def close(self) -> None:
        """End the threads and the groups; a second call does nothing, nor does one in a forked child."""
        with self._changed:
            if self._closed or os.getpid() != self._pid:
                return
            self._closed = True
        if self.failure is None:
            self._tell(_message(_END, ""))
        for finisher in self._finishers:
            finisher.close()
        self._disconnect()
        deadline = time.monotonic() + _SECONDS_TO_END
        for finisher in self._finishers:
            if finisher.thread is not threading.current_thread():
                finisher.thread.join(max(0.0, deadline - time.monotonic()))
        for group in {self.data, self._control}:
            if c10d._world.pg_map.get(group) is not None:  # the user may have destroyed all groups
                dist.destroy_process_group(group)

    # The listeners' side.

    def _listen(self, rank: int) -> None:
        heard = torch.zeros(_BYTES, dtype=torch.uint8)
        while True:
            try:
                self._control.recv([heard], self._order[rank], _CONTROL_TAG).wait(FOR_EVER)
            except RuntimeError as error:
                with self._changed:
                    self.gone[rank] = str(error).strip() or "its connection is closed"
                    self._changed.notify_all()
                return
            kind, text = _read(heard)
            if kind == _FAILURE:
                self.fail(text)
                return
            if kind == _END:
                self.ended.add(rank)
                continue
            with self._changed:
                self._heard[rank] += 1
                number = self._heard[rank]
                if number > self._begun:
                    self._ahead[rank][number] = text
                mine = self._mine.get(number, text)
                self._changed.notify_all()
            if mine != text:
                self.fail(self._differ(mine, rank, text))

    def _differ(self, mine: str, rank: int, theirs: str) -> str:
        return (
            f"all ranks make the same calls in the same order: rank {self._rank} began {mine} where rank {rank} began "
            f"{theirs}; see which call one of them left out or made twice"
        )

    # What is sent.

    def _announce(self, message: Tensor) -> None:
        for work in self._send(message):
            try:
                work.wait(FOR_EVER)
            except RuntimeError:  # a rank that has ended; whatever needs it will say so
                continue

    def _send(self, message: Tensor) -> list[dist.Work]:
        works = []
        for rank in self._others:
            try:
                works.append(self._control.send([message], self._order[rank], _CONTROL_TAG))
            except RuntimeError:
                continue
        return works

    def _tell(self, message: Tensor) -> None:
        deadline = time.monotonic() + _SECONDS_TO_TELL
        for work in self._send(message):
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError:
                continue

    def _disconnect(self) -> None:
        """Close the connections of the group over gloo, which ends every wait on it, here and on the other ranks."""
        nothing = torch.zeros(1, dtype=torch.uint8)
        for rank in self._others:
            try:
                self._control.recv([nothing], self._order[rank], _NO_TAG).wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue


def _new_group(name: str, parent: dist.ProcessGroup, backend: str, timeout: float) -> dist.ProcessGroup:
    """A group of the parent's ranks.

    ``dist.new_group`` has to be called by every process of the job, or names the group by how many the process has,
    which differs between ranks.  This is what it calls, given the name.
    """
    ranks = dist.get_process_group_ranks(parent)
    group, _ = c10d._new_process_group_helper(
        len(ranks),
        parent.rank(),
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


def _message(kind: int, text: str) -> Tensor:
    data = text.encode()[: _BYTES - 1].decode(errors="ignore").encode()
    return torch.frombuffer(bytearray(bytes([kind]) + data.ljust(_BYTES - 1, b"\0")), dtype=torch.uint8)


def _read(message: Tensor) -> tuple[int, str]:
    data = message.numpy().tobytes()
    return data[0], data[1:].rstrip(b"\0").decode()
