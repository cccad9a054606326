"""The transport over a torch.distributed process group.

The messages of a slot are posted at once.  Nothing waits for the whole slot: an op that needs a receive waits for that
one.  The tensors of a send are held, untouched, until it completes.  Every wait ends within ``timeout``.

======== ==================================== =====================================================
backend   a receive has completed              a send has completed
======== ==================================== =====================================================
gloo      when ``wait`` returns, on the host   when a receive that proves it has completed, or in ``drain``
NCCL      in stream order after ``wait``       likewise; ``drain`` polls on the host, with the timeout
======== ==================================== =====================================================

A wait of gloo cannot be interrupted, and one that times out closes the connections.  So the main thread waits by itself
only for what has arrived (``dualpipe.runtime.wire``), and otherwise for a helper thread that waits for it.

Every receive gets new buffers: a stage may keep its input, and autograd does.

NCCL joins the messages of a slot into one work and runs works in posting order, so there a receive completes with its
whole slot: the proofs that apply are those for the models ``stream`` and ``blocking``.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from numbers import Real
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from dualpipe.errors import RuleError
from dualpipe.runtime.helper_thread import NO_TIMEOUT
from dualpipe.runtime.peers import Peers
from dualpipe.runtime.rendezvous import Rendezvous
from dualpipe.runtime.transport import (
    Message,
    MessageError,
    SpoiledError,
)
from dualpipe.runtime.wire import Marks, Wire

_POLL_SECONDS = 0.002
_TURNS = 10
"""How often other processes get a turn before a wait is left to the helper thread, which takes longer."""


class ProcessGroupTransport:
    """Point-to-point messages between the ranks of a torch.distributed process group.

    The messages go over a process group of the transport's own, made when the ranks first compare their set-ups: an
    error closes it, and the user's group stays usable.  ``close()``, the end of a ``with`` block, or deleting the
    transport ends its threads and connections; by then the other ranks should no longer need it.

    Parameters
    ----------
    group:
        The pipeline's process group; the default group if ``None``.
    order:
        ``order[r]`` is the group rank of pipeline rank ``r``; the identity if ``None``.
    device:
        The device of received tensors.
    timeout:
        Seconds after which any wait ends in ``MessageError``; positive and finite.
    staged:
        Send and receive through pinned host memory: for CUDA tensors over gloo, which cannot send them itself.

    Raises ``RuleError`` if ``order`` is not a permutation, if ``timeout`` is not positive and finite, and for CUDA
    tensors over gloo that are not staged.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        order: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        timeout: float = 600.0,
        staged: bool = False,
    ) -> None:
        self.group: dist.ProcessGroup = c10d._get_default_group() if group is None else group
        self.order = list(range(dist.get_world_size(self.group))) if order is None else list(order)
        self.ranks = len(self.order)
        if sorted(self.order) != list(range(dist.get_world_size(self.group))):
            raise RuleError(
                "order must name each rank of the group once",
                f"got {self.order} for a group of {dist.get_world_size(self.group)}",
                "give a permutation",
            )
        if torch.device(device).type == "cuda" and not staged and dist.get_backend(self.group) == "gloo":
            raise RuleError("gloo sends no CUDA tensors", f"got device {device} on a gloo group", "pass staged=True")
        self.rank = self.order.index(dist.get_rank(self.group))
        self.device = torch.device(device)
        self.timeout = _require_timeout(timeout)
        self._limit = timedelta(seconds=self.timeout)
        self.staged = staged
        self.wire = torch.device("cpu") if staged else self.device
        self.stream_ordered = self.wire.type != "cpu"
        self._parent, self._pid = self.group, os.getpid()
        self._peers: Peers | None = None
        self._spoiled: str | None = None
        self._counts: dict[str, int] = {}
        self._inside = False
        self._contacted: set[int] = set()  # the ranks that this phase has exchanged messages with
        self._outstanding: dict[Message, None] = {}  # the messages that have not completed, in the order posted

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the transport's threads and connections; a second call does nothing."""
        peers, self._peers = self._peers, None
        self._spoiled = self._spoiled or "it was closed"
        self._outstanding.clear()
        if peers is not None:
            self.group = self._parent
            self._end()

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Entered around a call that exchanges messages; ``kind`` names the call, such as ``step``.

        All ranks enter the same phases in the same order, and compare them.  Any exception within spoils the
        transport on every rank: the others are notified before this rank leaves.  Raises ``SpoiledError`` if that has
        happened before, ``RuleError`` in a forked child.
        """
        if self._inside:  # part of a larger phase
            yield
            return
        self._require_usable()
        peers = self._open()
        number = self._counts[kind] = self._counts.get(kind, 0) + 1
        self._inside = True
        self._contacted.clear()
        try:
            peers.begin(f"{kind} {number}")
            yield
        except BaseException as error:
            self._fail(f"{kind} {number}", error)
            raise
        finally:
            self._inside = False

    def meet(self) -> None:
        """Wait until every other rank has begun this rank's phase; raises ``MessageError`` if one does not."""
        self._meet([rank for rank in range(self.ranks) if rank != self.rank])

    def _meet(self, ranks: Sequence[int]) -> None:
        started = time.monotonic()
        try:
            self._open().wait_until_begun(ranks, self.timeout)
        except RuntimeError as error:
            start = Message("the start of this call", ranks[0], False)
            raise MessageError(start, time.monotonic() - started, error) from error

    def _fail(self, where: str, error: BaseException) -> None:
        """Spoil the transport on this rank and on every other one."""
        peers = self._peers
        text = (str(error).strip().splitlines() or [""])[0]
        reason = f"rank {self.rank} failed in {where}: {type(error).__name__}{': ' if text else ''}{text}"
        if peers is not None:
            peers.fail(reason)
            reason = peers.failure or reason
        self._spoiled = self._spoiled or reason
        self._outstanding.clear()

    def _require_usable(self) -> None:
        if os.getpid() != self._pid:
            raise RuleError(
                "a pipeline must run in the process that made its transport",
                f"it was made in process {self._pid} and is used in its child {os.getpid()}",
                "use it in the parent, or initialise torch.distributed in the child and build it there",
            )
        if self._spoiled is None and self._peers is not None:
            self._spoiled = self._peers.failure
        if self._spoiled is not None:
            raise SpoiledError(self._spoiled)

    def agree(self, record: Mapping[str, str]) -> None:
        """Compare ``record`` across the ranks, each entry among those that have it.  The first call connects them.

        Raises ``DisagreementError``, which names the ranks that differ and how, or the rank that did not arrive.
        """
        self._require_usable()
        try:
            self._agree(record)
        except BaseException as error:
            self._fail("the comparison of set-ups", error)
            raise

    def _agree(self, record: Mapping[str, str]) -> None:
        with Rendezvous(self._parent, self.order, self.timeout) as rendezvous:
            name = rendezvous.compare(record)
            if self._peers is None:
                self._use(rendezvous.run(self._connect, name))
                rendezvous.confirm(name)

    def _connect(self, name: str) -> Peers:
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self._parent).split(","))
        return Peers(f"dualpipe-{name}", self._parent, self.order, backends[self.wire.type], self.timeout)

    def _use(self, peers: Peers) -> None:
        self._peers, self.group = peers, peers.data
        self._wire = Wire.over(peers.data, self.order, self.wire, batched=self.stream_ordered)
        self._waits = peers.helper("dualpipe-waits")
        self._end = weakref.finalize(self, peers.close)

    def _open(self) -> Peers:
        if self._peers is None:
            self.agree({})
        assert self._peers is not None
        return self._peers

    def post(self, messages: Sequence[Message]) -> None:
        """Post the messages of one slot, in the order given."""
        if not self._inside:
            self._require_usable()
        peers = self._peers or self._open()
        if not messages:
            return
        if peers.failure is not None:
            raise MessageError(messages[0], 0.0, RuntimeError(peers.failure))
        if self.stream_ordered:
            self._drop_completed()
        for message in messages:
            self._allocate(message)
            message.posted = True
            self._contacted.add(message.peer)
            self._outstanding[message] = None
        started = time.monotonic()
        try:  # NCCL has no tags; there ``drain`` compares the phases
            self._wire.post(messages, 0 if self.stream_ordered else peers.tag)
        except RuntimeError as error:  # the connection to a peer is closed already
            raise self._explain(messages[0], started, error) from error

    def _allocate(self, message: Message) -> None:
        if not message.sends:
            pinned = self.staged and self.device.type == "cuda"
            message.tensors = [
                torch.empty(spec.shape, dtype=spec.dtype, device=self.wire, pin_memory=pinned) for spec in message.specs
            ]
            if not self.stream_ordered:
                message.marks = Marks(message.tensors)
            return
        if self.staged:
            message.tensors = [_to_host(tensor) for tensor in message.tensors]
        else:
            message.tensors = [tensor.detach().resolve_conj().contiguous() for tensor in message.tensors]
        message.versions = tuple([tensor._version for tensor in message.tensors])

    def wait(self, message: Message) -> Sequence[Tensor]:
        """Wait for one message.  Returns what was received, on ``device``.  Each receive is waited for once."""
        if message.completed:
            return message.tensors
        if not message.posted:
            raise MessageError(message, 0.0, RuntimeError("it was never posted"))
        if self.stream_ordered:
            self._complete(message)
            message.completed = not message.sends
        elif message.marks is not None and _arrives(message.marks):
            self._finish([message])
        else:
            self._await([message])
        if message.sends:
            return ()
        if self.staged:
            message.tensors = [tensor.to(self.device, non_blocking=True) for tensor in message.tensors]
        if message.proves:
            if not self.stream_ordered:
                self._finish(message.proves)
            message.proves = ()
        return message.tensors

    def drain(self) -> None:
        """Wait until all posted messages have completed."""
        deadline = time.monotonic() + self.timeout
        if not self.stream_ordered:
            self._await(list(self._outstanding))
        for message in self._outstanding:
            if not message.completed:
                self.wait(message)
        for message in self._outstanding:
            self._poll(message, deadline)
            message.release()
        self._outstanding.clear()
        if self.stream_ordered and self._contacted:
            self._meet(sorted(self._contacted))

    def _complete(self, message: Message, limit: timedelta = NO_TIMEOUT) -> None:
        """Wait for the message's works, once: a second wait on gloo would wait for the next message."""
        started = time.monotonic()
        try:
            for work in message.works:
                if self.stream_ordered:
                    work.wait()  # with a timeout the host would wait, and nothing could run ahead
                else:
                    work.wait(limit)
        except RuntimeError as error:
            raise MessageError(message, time.monotonic() - started, error) from error
        if not self.stream_ordered:
            message.works.clear()
            message.release()
            message.completed = True
            message.marks = None
            self._outstanding.pop(message, None)

    def _finish(self, messages: Sequence[Message]) -> None:
        """Complete messages that are known to have arrived, in this thread."""
        for message in messages:
            if message.completed:
                continue
            started = time.monotonic()
            try:
                self._complete(message, self._limit)
            except MessageError as error:
                self._raise(error, started)

    def _await(self, messages: Sequence[Message]) -> None:
        """Wait for messages that the helper thread completes, one after another."""
        left = [message for message in messages if not message.completed]
        started = time.monotonic()
        while left:
            try:
                self._waits.submit(self._complete_all, left, caller_waits=True).result(self.timeout)
            except TimeoutError:
                first = next((message for message in left if not message.completed), left[0])
                raise MessageError(first, self.timeout, None) from None
            except MessageError as error:
                self._raise(error, started)
            left = [message for message in left if not message.completed]

    def _complete_all(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._complete(message)

    def _raise(self, error: MessageError, started: float) -> None:
        """Raise the error of a message with its reason, unless its peer has received it and ended."""
        message = error.message
        explained = self._explain(message, started, error.__cause__)
        if not (message.sends and self._peers is not None and message.peer in self._peers.ended):
            raise explained from error
        message.completed = True
        self._outstanding.pop(message, None)

    def _poll(self, message: Message, deadline: float) -> None:
        """Block the host until the message's works have completed: in stream order ``wait`` does not."""
        while not all(work.is_completed() for work in message.works):
            if self._peers is not None and (why := self._peers.failure or self._peers.disconnected.get(message.peer)):
                raise MessageError(message, 0.0, RuntimeError(why))
            if time.monotonic() > deadline:
                raise MessageError(message, self.timeout, None)
            time.sleep(_POLL_SECONDS)

    def _explain(self, message: Message, started: float, cause: BaseException | None) -> MessageError:
        """The error of a message, with the reason for which its peer failed if the peer gave one."""
        seconds = time.monotonic() - started
        reason = None if self._peers is None else self._peers.reason(message.peer)
        return MessageError(message, seconds, cause if reason is None else RuntimeError(reason))

    def _drop_completed(self) -> None:
        """Drop the messages whose works have completed."""
        for message in [message for message in self._outstanding if all(w.is_completed() for w in message.works)]:
            del self._outstanding[message]


def _arrives(marks: Marks) -> bool:
    """Whether a message has arrived, or does so while other processes get a turn."""
    for _ in range(_TURNS):
        if marks.gone():
            return True
        os.sched_yield()
    return marks.gone()


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned if it is from a GPU; complete when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach())


def _require_timeout(seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not math.isfinite(seconds) or seconds <= 0:
        raise RuleError("a timeout must be a positive number of seconds", f"got {seconds!r}", "give one, such as 600.0")
    return float(seconds)
