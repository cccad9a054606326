"""The transport over a torch.distributed process group.

The messages of a slot are posted at once.  Nothing waits for the whole slot: an op that needs a receive waits for that
one.  The tensors of a send are held, untouched, until it completes.  Every wait ends within ``timeout``.

======== ==================================== =====================================================
backend   a receive has completed              a send has completed
======== ==================================== =====================================================
gloo      when ``wait`` returns, on the host   when a helper thread's ``wait`` returns (gloo cannot be polled)
NCCL      in stream order after ``wait``       likewise; ``drain`` polls on the host, with the timeout
======== ==================================== =====================================================

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
from numbers import Real
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from dualpipe.errors import RuleError
from dualpipe.runtime.helper_thread import NO_TIMEOUT, Job
from dualpipe.runtime.peers import Peers
from dualpipe.runtime.rendezvous import Rendezvous
from dualpipe.runtime.transport import (
    Message,
    MessageError,
    SpoiledError,
)

_POLL_SECONDS = 0.002


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
        self.staged = staged
        self.wire = torch.device("cpu") if staged else self.device
        self.stream_ordered = self.wire.type != "cpu"
        self._parent, self._pid = self.group, os.getpid()
        self._peers: Peers | None = None
        self._spoiled: str | None = None
        self._counts: dict[str, int] = {}
        self._inside = False
        self._contacted: set[int] = set()  # the ranks that this phase has exchanged messages with
        self._outstanding: list[Message] = []

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
        self._sends, self._receives = peers.helper("dualpipe-sends"), peers.helper("dualpipe-receives")
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
        peers = self._open()
        if peers.failure is not None and messages:
            raise MessageError(messages[0], 0.0, RuntimeError(peers.failure))
        self._drop_completed()
        tag = 0 if self.stream_ordered else peers.tag  # NCCL has no tags; there ``drain`` compares the phases
        ops: list[dist.P2POp] = []
        owners: list[Message] = []
        for message in messages:
            self._allocate(message)
            message.posted = True
            self._contacted.add(message.peer)
            kind = dist.isend if message.sends else dist.irecv
            for tensor in message.tensors:
                peer = self.order[message.peer]
                wire = torch.view_as_real(tensor) if tensor.is_complex() else tensor  # NCCL has no complex numbers
                ops.append(dist.P2POp(kind, wire, group=self.group, group_peer=peer, tag=tag))
                owners.append(message)
        if not ops:
            return
        started = time.monotonic()
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:  # the connection to a peer is closed already
            raise self._explain(owners[0], started, error) from error
        if len(works) == len(ops):
            for owner, work in zip(owners, works, strict=True):
                owner.works.append(work)
        else:  # the backend coalesces the slot: a message completes when all the works do
            for message in messages:
                message.works += works
        self._outstanding += messages
        if not self.stream_ordered:
            for message in messages:
                if message.sends:
                    message.sent = self._sends.submit(self._complete, message)

    def _allocate(self, message: Message) -> None:
        if not message.sends:
            pinned = self.staged and self.device.type == "cuda"
            message.tensors = [
                torch.empty(spec.shape, dtype=spec.dtype, device=self.wire, pin_memory=pinned) for spec in message.specs
            ]
        elif self.staged:
            message.tensors = [_to_host(tensor) for tensor in message.tensors]
        else:
            message.tensors = [tensor.detach().resolve_conj().contiguous() for tensor in message.tensors]
        message.versions = tuple(tensor._version for tensor in message.tensors)

    def wait(self, message: Message) -> Sequence[Tensor]:
        """Wait for one message.  Returns what was received, on ``device``.  Each receive is waited for once."""
        if not message.posted:
            raise MessageError(message, 0.0, RuntimeError("it was never posted"))
        if message.sent is not None:
            self._await(message, message.sent)
        elif self.stream_ordered:
            self._complete(message)
        elif not message.completed:
            self._await(message, self._receives.submit(self._complete, message, caller_waits=True))
        if message.sends:
            return ()
        if self.staged and not message.completed:
            message.tensors = [tensor.to(self.device, non_blocking=True) for tensor in message.tensors]
        message.completed = True
        return message.tensors

    def drain(self) -> None:
        """Wait until all posted messages have completed."""
        deadline = time.monotonic() + self.timeout
        for message in self._outstanding:
            if not message.completed:
                self.wait(message)
        for message in self._outstanding:
            self._poll(message, deadline)
            message.release()
        self._outstanding.clear()
        if self.stream_ordered and self._contacted:
            self._meet(sorted(self._contacted))

    def _complete(self, message: Message) -> None:
        """Wait for the message's works, once: a second wait on gloo would wait for the next message."""
        started = time.monotonic()
        try:
            for work in message.works:
                if self.stream_ordered:
                    work.wait()  # with a timeout the host would wait, and nothing could run ahead
                else:
                    work.wait(NO_TIMEOUT)
        except RuntimeError as error:
            raise MessageError(message, time.monotonic() - started, error) from error
        if not self.stream_ordered:
            message.works.clear()
            message.release()

    def _poll(self, message: Message, deadline: float) -> None:
        """Block the host until the message's works have completed: in stream order ``wait`` does not."""
        while not all(work.is_completed() for work in message.works):
            if self._peers is not None and (why := self._peers.failure or self._peers.disconnected.get(message.peer)):
                raise MessageError(message, 0.0, RuntimeError(why))
            if time.monotonic() > deadline:
                raise MessageError(message, self.timeout, None)
            time.sleep(_POLL_SECONDS)

    def _await(self, message: Message, job: Job) -> None:
        """Wait for a message that a helper thread completes."""
        started = time.monotonic()
        try:
            job.result(self.timeout)
        except TimeoutError:
            raise MessageError(message, self.timeout, None) from None
        except MessageError as error:
            explained = self._explain(message, started, error.__cause__)
            if message.sends and self._peers is not None and message.peer in self._peers.ended:
                return  # the peer received this and ended, before a thread here woke up
            raise explained from error

    def _explain(self, message: Message, started: float, cause: BaseException | None) -> MessageError:
        """The error of a message, with the reason for which its peer failed if the peer gave one."""
        seconds = time.monotonic() - started
        reason = None if self._peers is None else self._peers.reason(message.peer)
        return MessageError(message, seconds, cause if reason is None else RuntimeError(reason))

    def _drop_completed(self) -> None:
        """Drop completed messages.  Raises the error of a send that failed in its helper thread."""
        kept: list[Message] = []
        for message in self._outstanding:
            if message.sent is not None:
                if message.sent.done():
                    self._await(message, message.sent)
                    continue
            elif all(work.is_completed() for work in message.works):
                continue
            kept.append(message)
        self._outstanding = kept


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned if it is from a GPU; complete when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach())


def _require_timeout(seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not math.isfinite(seconds) or seconds <= 0:
        raise RuleError("a timeout must be a positive number of seconds", f"got {seconds!r}", "give one, such as 600.0")
    return float(seconds)
