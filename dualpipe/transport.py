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

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe.errors import RuleError

_RECORD_BYTES = 4096
_POLL_SECONDS = 0.002
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
    works: list[dist.Work] = field(default_factory=list)
    posted: bool = False
    over: bool = False
    sent: Future[None] | None = None


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


class DisagreementError(RuntimeError):
    """The ranks of a pipeline were set up differently."""


class Transport(Protocol):
    """What the interpreter asks of a transport; a test may bring its own."""

    rank: int
    ranks: int

    def post(self, messages: Sequence[Message]) -> None: ...

    def wait(self, message: Message) -> Sequence[Tensor]: ...

    def drain(self) -> None: ...

    def agree(self, record: Mapping[str, str]) -> None: ...


class ProcessGroupTransport:
    """Point-to-point messages on a torch.distributed process group.

    Parameters
    ----------
    group:
        The pipeline's process group; the default group if ``None``.
    order:
        ``order[r]`` is the group rank of pipeline rank ``r``; the identity if ``None``.
    device:
        Where received tensors are wanted.
    timeout:
        Seconds after which any wait ends in ``MessageError``.
    staged:
        Send and receive through pinned host memory: for CUDA tensors over gloo, which cannot send them itself.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        order: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        timeout: float = 600.0,
        staged: bool = False,
    ) -> None:
        self.group = dist.group.WORLD if group is None else group
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
        self.timeout = timeout
        self.staged = staged
        self.wire = torch.device("cpu") if staged else self.device
        self.stream_ordered = self.wire.type != "cpu"
        self._outstanding: list[Message] = []
        self._sends: SimpleQueue[Message] = SimpleQueue()
        # a daemon: a rank that failed must be able to exit while a send of its own still waits
        threading.Thread(target=self._finish_sends, name="dualpipe-sends", daemon=True).start()

    def post(self, messages: Sequence[Message]) -> None:
        """Post the messages as one group, in the order given."""
        self._forget_finished()
        ops: list[dist.P2POp] = []
        owners: list[Message] = []
        for message in messages:
            self._allocate(message)
            message.posted = True
            kind = dist.isend if message.sends else dist.irecv
            for tensor in message.tensors:
                peer = self.order[message.peer]
                ops.append(dist.P2POp(kind, tensor, group=self.group, group_peer=peer))
                owners.append(message)
        if not ops:
            return
        started = time.monotonic()
        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:  # the connection to a peer is gone already
            raise MessageError(owners[0], time.monotonic() - started, error) from error
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
                    message.sent = Future()
                    self._sends.put(message)

    def wait(self, message: Message) -> Sequence[Tensor]:
        """Wait for one message; returns what was received, on ``device``.  Each receive is waited for once."""
        if not message.posted:
            raise MessageError(message, 0.0, RuntimeError("it was never posted"))
        if message.sent is not None:
            self._await_sent(message)
        else:
            self._finish(message)
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
        self._outstanding.clear()

    def agree(self, record: Mapping[str, str]) -> None:
        """Compare ``record`` across the ranks, each entry among those that have it.

        Raises ``DisagreementError`` that says which rank differs in what, or that not all came to compare.
        """
        text = json.dumps(dict(record)).encode()
        if len(text) > _RECORD_BYTES:
            raise DisagreementError(f"a record has at most {_RECORD_BYTES} bytes: got {len(text)}; send digests")
        mine = torch.zeros(_RECORD_BYTES, dtype=torch.uint8)
        mine[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        mine = mine.to(self.wire)
        gathered = [torch.zeros_like(mine) for _ in range(self.ranks)]
        work = dist.all_gather(gathered, mine, group=self.group, async_op=True)
        comparison = Message("the comparison of set-ups", self.rank, sends=True, works=[work])
        try:
            self._wait_all(comparison)
            self._poll(comparison, time.monotonic() + self.timeout)
        except MessageError as error:
            raise DisagreementError(
                f"every rank compares its set-up with the others' before the first message: rank {self.rank} waited "
                f"{self.timeout:g} s and not all came ({_why(error.__cause__)}); see why the others did not"
            ) from error
        records = [
            json.loads(bytes(gathered[self.order[rank]].cpu().tolist()).rstrip(b"\0")) for rank in range(self.ranks)
        ]
        for name in dict.fromkeys(name for other in records for name in other):
            groups: dict[str, list[int]] = {}
            for rank, other in enumerate(records):
                if name in other:
                    groups.setdefault(other[name], []).append(rank)
            if len(groups) > 1:
                told = "; ".join(f"{_ranks(ranks)} {value}" for value, ranks in groups.items())
                raise DisagreementError(f"every rank runs with the same {name}: {told}; set them up alike")

    def _finish_sends(self) -> None:
        """The helper thread: see every send to its end, in order."""
        while True:
            message = self._sends.get()
            assert message.sent is not None
            try:
                self._finish(message)
            except BaseException as error:
                message.sent.set_exception(error)
            else:
                message.sent.set_result(None)
            del message  # a thread that waits for the next one must not hold this one's tensors

    def _allocate(self, message: Message) -> None:
        if not message.sends:
            pinned = self.staged and self.device.type == "cuda"
            message.tensors = [
                torch.empty(spec.shape, dtype=spec.dtype, device=self.wire, pin_memory=pinned) for spec in message.specs
            ]
        elif self.staged:
            message.tensors = [_to_host(tensor) for tensor in message.tensors]
        else:
            message.tensors = [tensor.detach().contiguous() for tensor in message.tensors]

    def _finish(self, message: Message) -> None:
        """Wait for the message's works, once: waiting again on gloo would wait for the next message."""
        self._wait_all(message)
        if not self.stream_ordered:
            message.works.clear()
            if message.sends:
                message.tensors = ()

    def _wait_all(self, message: Message) -> None:
        started = time.monotonic()
        try:
            for work in message.works:
                if self.stream_ordered:
                    work.wait()  # a timeout here would make the host wait, and nothing could run ahead
                else:
                    work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise MessageError(message, time.monotonic() - started, error) from error

    def _poll(self, message: Message, deadline: float) -> None:
        """Block the host until the message's works are over, which in stream order ``wait`` does not."""
        while not all(work.is_completed() for work in message.works):
            if time.monotonic() > deadline:
                raise MessageError(message, self.timeout, None)
            time.sleep(_POLL_SECONDS)

    def _await_sent(self, message: Message) -> None:
        assert message.sent is not None
        try:
            message.sent.result(self.timeout)
        except TimeoutError:
            raise MessageError(message, self.timeout, None) from None

    def _forget_finished(self) -> None:
        """Drop finished messages; an error that the helper met in a send comes out here."""
        kept: list[Message] = []
        for message in self._outstanding:
            if message.sent is not None:
                if message.sent.done():
                    message.sent.result()
                    continue
            elif all(work.is_completed() for work in message.works):
                continue
            kept.append(message)
        self._outstanding = kept


def _to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where it comes from a GPU; complete when this returns."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach())


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 1 has`` or ``ranks 0, 2 have``."""
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"
