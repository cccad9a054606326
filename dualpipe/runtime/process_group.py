"""The transport over a torch.distributed process group.

The messages of a slot are posted at once.  Nothing waits for the whole slot: an op that needs a receive waits for that
one.  The tensors of a send are held, untouched, until it completes.  Every wait ends within ``timeout``.

======== ==================================== =====================================================
backend   a receive has completed              a send has completed
======== ==================================== =====================================================
gloo      when ``wait`` returns, on the host   when a receive that proves it has completed, or in ``drain``
NCCL      in stream order after ``wait``       likewise; ``drain`` polls on the host, with the timeout
======== ==================================== =====================================================

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
from numbers import Real
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from dualpipe.errors import RuleError
from dualpipe.runtime.outstanding import Outstanding
from dualpipe.runtime.peers import Peers
from dualpipe.runtime.rendezvous import Rendezvous
from dualpipe.runtime.transport import (
    Message,
    MessageError,
    SpoiledError,
    writes,
)
from dualpipe.runtime.wire import Marks, Wire, connect


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
    edges:
        ``"shared"``: one communicator for all messages.  ``"per-edge"``: one for each direction between neighbours, the
        first and the last rank included.  NCCL runs the messages of a communicator in the order in which they are
        posted, so on a shared one a receive posted early holds up every later send.  Each communicator of NCCL takes
        GPU memory.

    Raises ``RuleError`` on a rank outside the group, if ``order`` is not a permutation, if ``timeout`` is not positive
    and finite, if ``edges`` is neither of the two, if the group has no backend for the messages' device, and for CUDA
    tensors over gloo that are not staged.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        order: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        timeout: float = 600.0,
        staged: bool = False,
        edges: Literal["shared", "per-edge"] = "shared",
    ) -> None:
        self.group: dist.ProcessGroup = c10d._get_default_group() if group is None else group
        _require_member(self.group)
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
        self.staged, self.edges = staged, edges
        if edges not in ("shared", "per-edge"):
            raise RuleError('edges must be "shared" or "per-edge"', f"got {edges!r}", "give one of them")
        self.wire = torch.device("cpu") if staged else self.device
        self._backend = _require_backend(self.group, self.wire.type)
        self.stream_ordered = self.wire.type != "cpu"
        self._buffers: dict[str, Any] = {"device": self.wire}
        if staged and self.device.type == "cuda":
            self._buffers["pin_memory"] = True
        self._parent, self._pid = self.group, os.getpid()
        self._peers: Peers | None = None
        self._spoiled: str | None = None
        self._counts: dict[str, int] = {}
        self._inside = False
        self._contacted: set[int] = set()  # the ranks that this phase has exchanged messages with
        self._wire: Wire | None = None
        self._outstanding: Outstanding | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the transport's threads and connections; a second call does nothing."""
        peers, self._peers = self._peers, None
        self._spoiled = self._spoiled or "it was closed"
        self._wire = self._outstanding = None
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
            if self.stream_ordered:
                peers.announce_presence()  # ``drain`` waits for it
            yield
        except BaseException as error:
            self._fail(f"{kind} {number}", error)
            raise
        finally:
            self._inside = False

    def meet(self) -> None:
        """Wait until every other rank has come here in this phase; raises ``MessageError`` if one does not."""
        self._open().announce_presence()
        self._meet([rank for rank in range(self.ranks) if rank != self.rank])

    def _meet(self, ranks: Sequence[int]) -> None:
        started = time.monotonic()
        try:
            self._open().wait_until_present(ranks, self.timeout)
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
        if self._outstanding is not None:
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
            name = rendezvous.compare({**record, "communicators": self.edges})
            if self._peers is None:
                self._use(rendezvous.run(self._connect, name))
                rendezvous.confirm(name)

    def _connect(self, name: str) -> Peers:
        ring = {(rank, (rank + way) % self.ranks) for rank in range(self.ranks) for way in (1, -1)}
        edges = [edge for edge in ring if edge[0] != edge[1]] if self.edges == "per-edge" else []
        peers = Peers(f"dualpipe-{name}", self._parent, self.order, self._backend, self.timeout, edges)
        if self.stream_ordered:
            connect(peers.edges, self.rank, self.wire)
        return peers

    def _use(self, peers: Peers) -> None:
        self._peers, self.group = peers, peers.data
        self._wire = Wire(peers.data, self.order, self.rank, peers.edges, self.wire, batched=self.stream_ordered)
        self._outstanding = Outstanding(peers, self.timeout, self.stream_ordered)
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
        assert self._wire is not None and self._outstanding is not None  # noqa: PT018 # both come with the peers
        self._outstanding.add(messages)
        for message in messages:
            self._allocate(message)
            message.posted = True
            self._contacted.add(message.peer)
        started = time.monotonic()
        try:  # NCCL has no tags; there ``drain`` compares the phases
            self._wire.post(messages, 0 if self.stream_ordered else peers.tag)
        except RuntimeError as error:  # the connection to a peer is closed already
            raise self._outstanding.explain(messages[0], started, error) from error

    def _allocate(self, message: Message) -> None:
        if message.sends:
            message.tensors = tensors = [(_to_host if self.staged else _whole)(tensor) for tensor in message.tensors]
            message.versions = tuple([writes(tensor) for tensor in tensors])
            return
        message.tensors = [torch.empty(shape, dtype=dtype, **self._buffers) for shape, dtype in message.specs]
        if not self.stream_ordered:
            message.marks = Marks(message.tensors)

    def wait(self, message: Message) -> Sequence[Tensor]:
        """Wait for one message.  Returns what was received, on ``device``.  Each receive is waited for once."""
        if message.completed:
            return message.tensors
        if not message.posted:
            raise MessageError(message, 0.0, RuntimeError("it was never posted"))
        if self._outstanding is None:
            raise SpoiledError(self._spoiled or "it was closed")
        self._outstanding.wait(message)
        if message.sends:
            return ()
        if self.staged:
            message.tensors = [tensor.to(self.device, non_blocking=True) for tensor in message.tensors]
        return message.tensors

    def drain(self) -> None:
        """Wait until all posted messages have completed."""
        if self._outstanding is not None:
            self._outstanding.drain()
        if self.stream_ordered and self._contacted:
            self._meet(sorted(self._contacted))


def _whole(tensor: Tensor) -> Tensor:
    """The tensor as it is sent: contiguous, and without a gradient."""
    if tensor.requires_grad or tensor.is_conj() or not tensor.is_contiguous():
        return tensor.detach().resolve_conj().contiguous()
    return tensor


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned if it is from a GPU; complete when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach())


def _require_member(group: dist.ProcessGroup) -> None:
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise RuleError(
            "a transport must be made on the ranks of its group alone",
            f"rank {dist.get_rank()} is not in it",
            "make it where new_group() returned a group that the rank is a member of",
        )


def _require_backend(group: dist.ProcessGroup, device: str) -> str:
    """The group's backend for tensors of a type of device."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    if device not in backends:
        raise RuleError(
            f"the process group must have a backend for the device of the messages, {device}",
            f"it has {', '.join(f'{backend} for {kind}' for kind, backend in backends.items())}",
            "pass device= for the tensors' device, or initialise the group with 'cpu:gloo,cuda:nccl'",
        )
    return backends[device]


def _require_timeout(seconds: float) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not math.isfinite(seconds) or seconds <= 0:
        raise RuleError("a timeout must be a positive number of seconds", f"got {seconds!r}", "give one, such as 600.0")
    return float(seconds)
