"""Watch torch.distributed's point-to-point calls.

Inside torch, ``send`` and ``recv`` are ``isend`` and ``irecv`` followed by a wait, so three functions are enough, with
the context in which NCCL joins single calls to a batch.  The functions themselves are changed, because a program may
already have imported them by name or put them into a ``P2POp``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from . import nccl, torch_cuda
from .flow import Flow
from .log import call_path
from .patches import Patches
from .pending import Pending
from .transport import Transport


class _Message(NamedTuple):
    """One end of a message that is about to be posted.  ``given`` are the arguments of torch's function."""

    kind: str
    tensor: Tensor
    peer: int
    group: Any
    tag: int
    function: Any
    given: dict[str, Any]
    at: str


def watch(flow: Flow, patches: Patches) -> Transport:
    """Watch the calls until ``patches.undo()``."""
    transport = Transport()
    watched = _Watched(flow, transport)
    patches.wrap(c10d.isend, lambda original: watched.single(original, "send", "dst"))
    patches.wrap(c10d.irecv, lambda original: watched.single(original, "receive", "src"))
    patches.wrap(c10d.batch_isend_irecv, watched.batch)
    patches.put(c10d.P2POp, "__init__", _noting_place(c10d.P2POp.__init__))
    patches.wrap(c10d._coalescing_manager, watched.coalescing)
    torch_cuda.AT_SYNCHRONIZE.append(watched.wait_for_all)
    patches.later(lambda: torch_cuda.AT_SYNCHRONIZE.remove(watched.wait_for_all))
    return transport


_MADE_AT = "_dualpipe_made_at"


def _noting_place(original: Any) -> Any:
    """Note where the program makes the parts of a batch: the batch itself is often posted by one helper."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - replaces that method
        original(self, *args, **kwargs)
        setattr(self, _MADE_AT, call_path())

    return __init__


class _Watched:
    """The calls of one rank, and the messages in flight."""

    def __init__(self, flow: Flow, transport: Transport) -> None:
        self._flow, self._transport = flow, transport
        self._joined: list[_Message] | None = None  # the messages of a batch that is being put together
        self._in_flight: list[Pending] = []

    def wait_for_all(self) -> None:
        """Every message in flight completes, as those of NCCL do when the program waits for a device."""
        for pending in list(self._in_flight):
            pending.wait()

    def single(self, original: Any, kind: str, peer_name: str) -> Any:
        flow, transport = self._flow, self._transport

        def call(
            tensor: Any,
            peer: int | None = None,
            group: Any = None,
            tag: int = 0,
            group_peer: int | None = None,
            **more: Any,
        ) -> Any:
            peer = more.pop(peer_name, peer)
            group_peer = more.pop(f"group_{peer_name}", group_peer)
            passed = {peer_name: peer, "group": group, "tag": tag, f"group_{peer_name}": group_peer, **more}
            if transport.inside:
                return original(tensor, **passed)
            ranks = c10d.get_process_group_ranks(group or c10d._get_default_group())
            if peer is None and group_peer is None:
                flow.write("any source", at=call_path())
                return transport.run(original, tensor, **passed)
            other = ranks[group_peer] if peer is None and group_peer is not None else peer
            message = _Message(kind, tensor, int(other or 0), group, tag, original, passed, call_path())
            if self._joined is not None:
                self._joined.append(message)
                return None
            (work,) = self._post([message])
            return work

        return call

    def batch(self, original: Any) -> Any:
        def call(p2p_op_list: Any) -> Any:
            if self._transport.inside:
                return original(p2p_op_list)
            c10d._check_p2p_op_list(p2p_op_list)
            works = self._post([self._message(op) for op in p2p_op_list])
            return self._joined_work(works, p2p_op_list[0].group)

        return call

    def _message(self, op: Any) -> _Message:
        kind, peer_name = ("send", "dst") if op.op is dist.isend else ("receive", "src")
        passed = {"group": op.group, "tag": op.tag, f"group_{peer_name}": op.group_peer}
        return _Message(kind, op.tensor, op.peer, op.group, op.tag, op.op, passed, getattr(op, _MADE_AT, ""))

    def coalescing(self, original: Any) -> Any:
        """``_coalescing_manager`` with a device: NCCL runs the single messages in it as a batch."""

        def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
            if self._transport.inside or device is None:
                yield from original(group, device, async_ops)
                return
            joined, before = c10d._CoalescingManager(), self._joined
            self._joined = []
            try:
                yield joined
                messages = self._joined
            finally:
                self._joined = before
            works = self._joined_work(self._post(messages), group) if messages else []
            for work in works:
                if async_ops:
                    joined.append(work)
                else:
                    work.wait()

        return manager

    def _joined_work(self, works: list[Any], group: Any) -> list[Any]:
        """What a batch returns: NCCL's is one work."""
        if not nccl.stands_for_nccl(group):
            return works
        return [Pending.of(self._flow, works, self._in_flight)]

    def _post(self, messages: Sequence[_Message]) -> list[Any]:
        """Post messages together; returns their works."""
        flow = self._flow
        numbers = flow.post([(m.kind, m.tensor, m.peer, m.group, m.tag, m.at) for m in messages])
        held = [flow.buffers.hold(m.kind == "send", m.tensor) for m in messages]
        try:
            works = [
                self._transport.run(m.function, tensor, **m.given) for m, tensor in zip(messages, held, strict=True)
            ]
        except BaseException as error:
            flow.note_error(error, "M", flow.posted)
            raise
        pending = []
        for number, message, alias, work in zip(numbers, messages, held, works, strict=True):
            flow.buffers.posted(number, message.kind == "send", message.tensor, alias, flow.context)
            pending.append(None if work is None else Pending(flow, [work], [number], self._in_flight))
        return pending
