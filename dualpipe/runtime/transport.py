"""Messages between the ranks of a pipeline, over torch.distributed.

A batch of messages is posted at once and never waited for as a whole: whoever needs a receive waits for that one.
A send's tensors are held, untouched, until the send is over, and let go then.  Every wait ends by ``timeout``.

======== ==================================== =====================================================
backend   a receive is over                    a send is over
======== ==================================== =====================================================
gloo      when ``wait`` returns, on the host   when a helper thread's ``wait`` returns (there is no polling)
NCCL      in stream order after ``wait``       likewise; ``drain`` polls on the host, with the timeout
======== ==================================== =====================================================

NCCL joins a batch into one work and runs batches in posting order, so there a receive is over when its whole batch
is: what is proved for the models ``stream`` and ``blocking`` is what counts.
"""

from __future__ import annotations

import math
import os
import re
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from dualpipe.errors import RuleError
from dualpipe.runtime.peers import FOR_EVER, Finisher, Job, Peers
from dualpipe.runtime.rendezvous import MissingRankError, Rendezvous

_POLL_SECONDS = 0.002
_LONGEST_SHOWN = 400  # characters of an entry of a record that differs
_SOURCE = re.compile(r"^\[[^]]*\] ")  # gloo's errors begin with the file and line of its own source


class TensorSpec(NamedTuple):
    """The shape and dtype of a tensor that crosses a stage boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(eq=False)
class Message:
    """One send or receive.  ``label`` names it in errors, ``peer`` is the pipeline rank at the other end.

    ``tensors`` is what a send sends, and what a receive has received once it was waited for.
    """

    label: str
    peer: int
    sends: bool
    tensors: Sequence[Tensor] = ()
    specs: Sequence[TensorSpec] = ()
    versions: tuple[int, ...] = ()
    works: list[dist.Work] = field(default_factory=list)
    posted: bool = False
    over: bool = False
    sent: Job | None = None


class MessageError(RuntimeError):
    """A message that did not come to its end: timed out, or its peer is gone."""

    def __init__(self, message: Message, seconds: float, cause: BaseException | None) -> None:
        self.message = message
        kind = "send" if message.sends else "receive"
        towards = "to" if message.sends else "from"
        super().__init__(
            f"{kind} {message.label} {towards} rank {message.peer} failed after {seconds:.1f} s: {_why(cause)}"
        )


def _why(cause: BaseException | None) -> str:
    """The first sentence of an error."""
    return "the time is up" if cause is None else _SOURCE.sub("", str(cause).strip()).splitlines()[0].split(". ")[0]


class OverwrittenError(RuntimeError):
    """A tensor was written to while it was sent."""


class DisagreementError(RuntimeError):
    """The ranks of a pipeline were set up differently, or a rank is missing."""


class SpoiledError(RuntimeError):
    """A call to a pipeline that has failed before, on this rank or another, or that was closed."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"this pipeline cannot be used any more: {reason}; the ranks may have stopped at different places, and "
            "gradients of the step that failed are incomplete: build a new transport and pipeline on every rank, and "
            "load weights and optimizer from a checkpoint"
        )


class Transport(Protocol):
    """What the interpreter asks of a transport; a test may bring its own."""

    rank: int
    ranks: int

    def post(self, messages: Sequence[Message]) -> None: ...

    def wait(self, message: Message) -> Sequence[Tensor]: ...

    def drain(self) -> None: ...

    def agree(self, record: Mapping[str, str]) -> None: ...

    def phase(self, kind: str) -> AbstractContextManager[None]:
        """Entered around a call that exchanges messages, by all ranks in the same order; an error spoils them all."""
        ...

    def close(self) -> None: ...


class ProcessGroupTransport:
    """Point-to-point messages between the ranks of a torch.distributed process group.

    The messages go over a process group of the transport's own, made when the ranks first compare their set-ups: an
    error closes it, and the user's group stays usable.  ``close()``, the end of a ``with`` block, or letting the
    transport go ends its threads and connections; the other ranks should be done with it by then.

    Parameters
    ----------
    group:
        The pipeline's process group; the default group if ``None``.
    order:
        ``order[r]`` is the group rank of pipeline rank ``r``; the identity if ``None``.
    device:
        Where received tensors are wanted.
    timeout:
        Seconds after which any wait ends in ``MessageError``; positive and finite.
    staged:
        Send and receive through pinned host memory: for CUDA tensors over gloo, which cannot send them itself.

    Raises ``RuleError`` for an ``order`` that is no permutation, a ``timeout`` that is no time to wait, and CUDA
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
                "order names each rank of the group once",
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
        self._with: set[int] = set()  # the ranks that this phase has exchanged messages with
        self._outstanding: list[Message] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the transport's threads and connections; calling it again does nothing."""
        peers, self._peers = self._peers, None
        self._spoiled = self._spoiled or "it was closed"
        self._outstanding.clear()
        if peers is not None:
            self.group = self._parent
            self._end()

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Around a call that exchanges messages: ``kind`` is what it is, such as ``step``.

        All ranks enter the same phases in the same order, which they compare.  Any exception within spoils the
        transport on every rank: the others learn of it before this rank leaves.  Raises ``SpoiledError`` if that has
        happened before, ``RuleError`` in a forked child.
        """
        if self._inside:  # a part of a larger one
            yield
            return
        self._require_usable()
        peers = self._open()
        number = self._counts[kind] = self._counts.get(kind, 0) + 1
        self._inside = True
        self._with.clear()
        try:
            peers.begin(f"{kind} {number}")
            yield
        except BaseException as error:
            self._fail(f"{kind} {number}", error)
            raise
        finally:
            self._inside = False

    def meet(self) -> None:
        """Wait until every other rank has begun this rank's phase; raises ``MessageError`` where one does not."""
        self._meet([rank for rank in range(self.ranks) if rank != self.rank])

    def _meet(self, ranks: Sequence[int]) -> None:
        started = time.monotonic()
        try:
            self._open().meet(ranks, self.timeout)
        except RuntimeError as error:
            raise MessageError(Message("the start of this call", ranks[0], False), _since(started), error) from error

    def _fail(self, where: str, error: BaseException) -> None:
        """Spoil the transport here and on every other rank."""
        peers = self._peers
        said = (str(error).strip().splitlines() or [""])[0]
        reason = f"rank {self.rank} failed in {where}: {type(error).__name__}{': ' if said else ''}{said}"
        if peers is not None:
            peers.fail(reason)
            reason = peers.failure or reason
        self._spoiled = self._spoiled or reason
        self._outstanding.clear()

    def _require_usable(self) -> None:
        if os.getpid() != self._pid:
            raise RuleError(
                "a pipeline runs in the process that made its transport",
                f"it was made in process {self._pid} and is used in its child {os.getpid()}",
                "use it in the parent, or initialise torch.distributed in the child and build it there",
            )
        if self._spoiled is None and self._peers is not None:
            self._spoiled = self._peers.failure
        if self._spoiled is not None:
            raise SpoiledError(self._spoiled)

    def _open(self) -> Peers:
        if self._peers is None:
            self.agree({})
        assert self._peers is not None
        return self._peers

    def post(self, messages: Sequence[Message]) -> None:
        """Post the messages as one group, in the order given."""
        if not self._inside:
            self._require_usable()
        peers = self._open()
        if peers.failure is not None and messages:
            raise MessageError(messages[0], 0.0, RuntimeError(peers.failure))
        self._forget_finished()
        tag = 0 if self.stream_ordered else peers.tag  # NCCL has no tags; there ``drain`` compares the phases
        ops: list[dist.P2POp] = []
        owners: list[Message] = []
        for message in messages:
            self._allocate(message)
            message.posted = True
            self._with.add(message.peer)
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
        except RuntimeError as error:  # the connection to a peer is gone already
            raise self._explained(owners[0], started, error) from error
        if len(works) == len(ops):
            for owner, work in zip(owners, works, strict=True):
                owner.works.append(work)
        else:  # a backend that coalesces the batch: the batch is over when all its works are
            for message in messages:
                message.works += works
        self._outstanding += messages
        if not self.stream_ordered:
            for message in messages:
                if message.sends:
                    message.sent = self._sends.submit(self._finish, message)

    def wait(self, message: Message) -> Sequence[Tensor]:
        """Wait for one message; returns what was received, on ``device``.  Each receive is waited for once."""
        if not message.posted:
            raise MessageError(message, 0.0, RuntimeError("it was never posted"))
        if message.sent is not None:
            self._result(message, message.sent)
        elif self.stream_ordered:
            self._finish(message)
        elif not message.over:
            self._result(message, self._receives.submit(self._finish, message, waited_for=True))
        if message.sends:
            return ()
        if self.staged and not message.over:
            message.tensors = [tensor.to(self.device, non_blocking=True) for tensor in message.tensors]
        message.over = True
        return message.tensors

    def drain(self) -> None:
        """Wait until every message that was posted is over."""
        deadline = time.monotonic() + self.timeout
        for message in self._outstanding:
            if not message.over:
                self.wait(message)
        for message in self._outstanding:
            self._poll(message, deadline)
            self._let_go(message)
        self._outstanding.clear()
        if self.stream_ordered and self._with:
            self._meet(sorted(self._with))

    def agree(self, record: Mapping[str, str]) -> None:
        """Compare ``record`` across the ranks, each entry among those that have it; the first time, connect them.

        Raises ``DisagreementError`` that says which rank differs in what, or which did not come.
        """
        self._require_usable()
        try:
            self._agree(record)
        except BaseException as error:
            self._fail("the comparison of set-ups", error)
            raise

    def _agree(self, record: Mapping[str, str]) -> None:
        rendezvous = Rendezvous(
            c10d.PrefixStore("dualpipe", c10d._get_process_group_store(self._parent)),
            dist.get_rank(self._parent),
            self.ranks,
        )
        helper = Finisher("dualpipe-rendezvous")
        try:
            name, found = self._during(helper.submit(rendezvous.meet, record, self.timeout))
            _compare([found[position] for position in self.order])
            if self._peers is None:
                self._connected(self._during(helper.submit(self._connect, name)))
                self._during(helper.submit(rendezvous.confirm, name, self.timeout))
        except (MissingRankError, dist.DistError, TimeoutError) as error:
            raise DisagreementError(
                f"every rank compares its set-up with the others' before the first message: rank {self.rank} waited "
                f"{self.timeout:g} s and not all came ({_why(error)}); see why the others did not"
            ) from error
        finally:
            rendezvous.cancelled.set()
            helper.close()

    def _connect(self, name: str) -> Peers:
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self._parent).split(","))
        return Peers(f"dualpipe-{name}", self._parent, self.order, backends[self.wire.type], self.timeout)

    def _connected(self, peers: Peers) -> None:
        self._peers, self.group = peers, peers.data
        self._sends, self._receives = peers.finisher("dualpipe-sends"), peers.finisher("dualpipe-receives")
        self._end = weakref.finalize(self, peers.close)

    def _during(self, job: Job) -> Any:
        """The result of what a helper thread does with a timeout of its own; the main thread can be interrupted."""
        return job.result(self.timeout + 1.0)

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

    def _finish(self, message: Message) -> None:
        """Wait for the message's works, once: waiting again on gloo would wait for the next message."""
        self._wait_all(message)
        if not self.stream_ordered:
            message.works.clear()
            self._let_go(message)

    def _let_go(self, message: Message) -> None:
        """After a send: it was right if nobody has written to its tensors meanwhile."""
        if message.sends:
            written = message.versions != tuple(tensor._version for tensor in message.tensors)
            message.tensors, message.versions = (), ()
            if written:
                cause = OverwrittenError("its tensor was written to while it was sent; return new ones")
                raise MessageError(message, 0.0, cause) from cause

    def _wait_all(self, message: Message) -> None:
        started = time.monotonic()
        try:
            for work in message.works:
                if self.stream_ordered:
                    work.wait()  # a timeout here would make the host wait, and nothing could run ahead
                else:
                    work.wait(FOR_EVER)  # a helper thread's: it ends by the message or with the group
        except RuntimeError as error:
            raise MessageError(message, time.monotonic() - started, error) from error

    def _poll(self, message: Message, deadline: float) -> None:
        """Block the host until the message's works are over, which in stream order ``wait`` does not."""
        while not all(work.is_completed() for work in message.works):
            if self._peers is not None and (why := self._peers.failure or self._peers.gone.get(message.peer)):
                raise MessageError(message, 0.0, RuntimeError(why))
            if time.monotonic() > deadline:
                raise MessageError(message, self.timeout, None)
            time.sleep(_POLL_SECONDS)

    def _result(self, message: Message, job: Job, seconds: float | None = None) -> None:
        """Wait for a message that a helper thread sees to its end."""
        started, seconds = time.monotonic(), self.timeout if seconds is None else seconds
        try:
            job.result(seconds)
        except TimeoutError:
            raise MessageError(message, seconds, None) from None
        except MessageError as error:
            explained = self._explained(message, started, error.__cause__)
            overwritten = isinstance(error.__cause__, OverwrittenError)
            if message.sends and not overwritten and self._peers is not None and message.peer in self._peers.ended:
                return  # the peer ended after it had received this, and before a thread here woke up
            raise error if overwritten else explained from error

    def _explained(self, message: Message, started: float, cause: BaseException | None) -> MessageError:
        """The error of a message, with the reason that its peer gave for failing if it gave one."""
        seconds = _since(started)
        why = None if self._peers is None else self._peers.why(message.peer)
        return MessageError(message, seconds, cause if why is None else RuntimeError(why))

    def _forget_finished(self) -> None:
        """Drop finished messages; an error that the helper met in a send comes out here."""
        kept: list[Message] = []
        for message in self._outstanding:
            if message.sent is not None:
                if message.sent.ended():
                    self._result(message, message.sent)
                    continue
            elif all(work.is_completed() for work in message.works):
                continue
            kept.append(message)
        self._outstanding = kept


def _require_timeout(seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not math.isfinite(seconds) or seconds <= 0:
        raise RuleError("a timeout is a positive number of seconds", f"got {seconds!r}", "give one, such as 600.0")
    return float(seconds)


def _since(started: float) -> float:
    return time.monotonic() - started


def _compare(records: Sequence[Mapping[str, str]]) -> None:
    """Each entry among the ranks that have it; ``records`` are in order of rank."""
    for name in dict.fromkeys(name for record in records for name in record):
        groups: dict[str, list[int]] = {}
        for rank, record in enumerate(records):
            if name in record:
                groups.setdefault(record[name], []).append(rank)
        if len(groups) > 1:
            shown = "; ".join(f"{_ranks(ranks)} {_excerpt(value, groups)}" for value, ranks in groups.items())
            raise DisagreementError(f"every rank runs with the same {name}: {shown}; set them up alike")


def _excerpt(value: str, values: Mapping[str, Any]) -> str:
    """The value; of a long one what surrounds the first difference."""
    if all(len(other) <= _LONGEST_SHOWN for other in values):
        return value
    alike = next((at for at, letters in enumerate(zip(*values, strict=False)) if len(set(letters)) > 1), None)
    start = max(0, (min(map(len, values)) if alike is None else alike) - _LONGEST_SHOWN // 4)
    end = start + _LONGEST_SHOWN
    return f"{'... ' if start else ''}{value[start:end]}{' ...' if end < len(value) else ''}"


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where it comes from a GPU; complete when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach())


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 1 has`` or ``ranks 0, 2 have``."""
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
