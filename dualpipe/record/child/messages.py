"""Watch torch.distributed's point-to-point calls.

Inside torch, ``send`` and ``recv`` are ``isend`` and ``irecv`` followed by a wait, so three functions are enough.  The
functions themselves are changed, because a program may already have imported them by name or put them into a ``P2POp``.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from . import nccl
from .flow import Flow
from .log import call_path
from .patches import Patches


def watch(flow: Flow, patches: Patches) -> None:
    """Watch the calls until ``patches.undo()``."""
    inside = False  # the originals call watched functions: in a batch, and through a function mode

    def unwatched(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            flow.broke(error, "M", flow.posted)
            raise
        finally:
            inside = False

    def single(original: Any, kind: str, peer_name: str) -> Any:
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
            if inside:
                return original(tensor, **passed)
            ranks = c10d.get_process_group_ranks(group or c10d._get_default_group())
            if peer is None and group_peer is None:
                flow.write("any source", at=call_path())
                return unwatched(original, tensor, **passed)
            other = ranks[group_peer] if peer is None and group_peer is not None else peer
            numbers = flow.post([(kind, tensor, int(other or 0), group, tag)])
            held = flow.buffers.hold(kind == "send", tensor)
            work = unwatched(original, held, **passed)
            flow.buffers.posted(numbers[0], kind == "send", tensor, held, flow.context)
            return _watched(flow, work, numbers)

        return call

    def batched(original: Any) -> Any:
        def call(p2p_op_list: Any) -> Any:
            if inside:
                return original(p2p_op_list)
            posted = [
                (
                    "send" if op.op is dist.isend else "receive",
                    op.tensor,
                    op.peer,
                    op.group,
                    op.tag,
                )
                for op in p2p_op_list
            ]
            numbers = flow.post(posted)
            given = [op.tensor for op in p2p_op_list]
            held = [flow.buffers.hold(kind == "send", tensor) for kind, tensor, *_ in posted]
            try:
                for op, tensor in zip(p2p_op_list, held, strict=True):
                    op.tensor = tensor
                works = unwatched(original, p2p_op_list)
            finally:
                for op, tensor in zip(p2p_op_list, given, strict=True):
                    op.tensor = tensor
            for number, (kind, tensor, *_), alias in zip(numbers, posted, held, strict=True):
                flow.buffers.posted(number, kind == "send", tensor, alias, flow.context)
            if nccl.stands_for_nccl(p2p_op_list[0].group):
                return [_watched(flow, nccl.OneWork(works), numbers)]
            if len(works) == len(numbers):
                return [_watched(flow, work, [number]) for work, number in zip(works, numbers, strict=True)]
            return [_watched(flow, work, numbers) for work in works]

        return call

    patches.wrap(c10d.isend, lambda original: single(original, "send", "dst"))
    patches.wrap(c10d.irecv, lambda original: single(original, "receive", "src"))
    patches.wrap(c10d.batch_isend_irecv, batched)


def _watched(flow: Flow, work: Any, numbers: list[int]) -> Any:
    return work if work is None else _Work(flow, work, numbers)


class _Work(dist.Work):
    """A pending message that reports when the program waits for it."""

    def __init__(self, flow: Flow, work: Any, numbers: list[int]) -> None:
        super().__init__()
        self._flow, self._work, self._numbers = flow, work, numbers
        self._completed = False

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        if self._completed:
            return self._work.wait(*args, **kwargs)
        self._flow.write("wait", messages=self._numbers, own=self._flow.on_own_thread())
        try:
            result = self._work.wait(*args, **kwargs)
        except BaseException as error:
            self._flow.broke(error, "M", self._numbers)
            raise
        self._note_completed()
        return result

    def is_completed(self) -> bool:
        done = bool(self._work.is_completed())
        if done:
            self._note_completed()
        return done

    def _note_completed(self) -> None:
        if not self._completed:
            self._completed = True
            self._flow.buffers.completed(self._numbers)
            self._flow.write("completed", messages=self._numbers, at=call_path())

    def __getattribute__(self, name: str) -> Any:
        if name in _OWN or name.startswith("__"):
            return super().__getattribute__(name)
        return getattr(super().__getattribute__("_work"), name)


_OWN = frozenset({"wait", "is_completed", "_note_completed", "_flow", "_work", "_numbers", "_completed"})
