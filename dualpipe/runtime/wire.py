"""Puts the tensors of messages onto the process groups of a pipeline.

gloo      each tensor is posted by itself, straight to the backend
NCCL      the messages of a slot are one ``batch_isend_irecv`` for each group: single sends and receives of a
          communicator would wait for each other
watched   where a program has replaced torch's functions to see its messages (``dualpipe record`` does), they are called

On gloo nothing but a wait tells whether a receive has completed, and Ctrl-C cannot interrupt a wait.  So the last byte
of a buffer is marked before its receive is posted.  A connection delivers bytes in order: once the mark is gone the
message has arrived, and a wait for it ends at once.  A message whose last byte equals the mark, or that has a tensor
without bytes, looks late, no more.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from dualpipe.runtime.transport import Message

_MARK = 0xFF
"""As the last byte of a floating number: not a number, or beyond -1e38 in bfloat16 and float32."""
_TORCH = str(Path(c10d.__file__).parent)


class Channel(NamedTuple):
    """Where the messages to or from a peer go: a process group, its backend, and the peer's rank in the group."""

    group: dist.ProcessGroup
    backend: Any
    peer: int


class Wire:
    """The channels of pipeline rank ``rank``.

    Parameters
    ----------
    group:
        For all messages except those on ``edges``; ``order[r]`` is the group rank of pipeline rank ``r``.
    edges:
        Groups of two ranks for the messages from one pipeline rank to another.
    device:
        Of the tensors.
    batched:
        Whether the messages of a slot are posted as a batch.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        order: Sequence[int],
        rank: int,
        edges: Mapping[tuple[int, int], dist.ProcessGroup],
        device: torch.device,
        batched: bool,
    ) -> None:
        self.batched = batched
        shared = [Channel(group, group._get_backend(device), peer) for peer in order]
        self.sending, self.receiving = list(shared), list(shared)
        """By the pipeline rank of the peer."""
        for (source, target), pair in edges.items():
            channel = Channel(pair, pair._get_backend(device), 1 - pair.rank())
            if source == rank:
                self.sending[target] = channel
            else:
                self.receiving[source] = channel

    def post(self, messages: Sequence[Message], tag: int) -> None:
        """Post the tensors of all messages in the order given; each message gets its works."""
        if self.batched or watched():
            self._post_batches(messages, tag)
            return
        for message in messages:
            _, backend, peer = self.channel(message)
            post = backend.send if message.sends else backend.recv
            for tensor in message.tensors:
                message.works.append(post([_plain(tensor)], peer, tag))

    def channel(self, message: Message) -> Channel:
        return (self.sending if message.sends else self.receiving)[message.peer]

    def _post_batches(self, messages: Sequence[Message], tag: int) -> None:
        batches: dict[dist.ProcessGroup, list[tuple[Message, dist.P2POp]]] = defaultdict(list)
        for message in messages:
            group, _, peer = self.channel(message)
            kind = dist.isend if message.sends else dist.irecv
            for tensor in message.tensors:
                op = dist.P2POp(kind, _plain(tensor), group=group, group_peer=peer, tag=tag)
                batches[group].append((message, op))
        for batch in batches.values():
            works = dist.batch_isend_irecv([op for _, op in batch])
            if len(works) == len(batch):
                for (message, _), work in zip(batch, works, strict=True):
                    message.works.append(work)
            else:  # the backend joins the batch: a message completes when all the works do
                for message in dict.fromkeys(message for message, _ in batch):
                    message.works += works


class Marks:
    """The marks in the buffers of a receive."""

    __slots__ = ("_bytes", "_complete")

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._bytes = [
            ctypes.c_ubyte.from_address(buffer.data_ptr() + buffer.nbytes - 1) for buffer in buffers if buffer.nbytes
        ]
        self._complete = len(self._bytes) == len(buffers)  # a tensor without bytes shows nothing
        for byte in self._bytes:
            byte.value = _MARK

    def gone(self) -> bool:
        """Whether each buffer had a mark, and all are gone.  Call it only while the buffers exist."""
        return self._complete and _MARK not in [byte.value for byte in self._bytes]


def connect(edges: Mapping[tuple[int, int], dist.ProcessGroup], rank: int, device: torch.device) -> None:
    """Send a number over each edge of ``rank``: NCCL connects a group at its first message, with both ranks.

    All ranks go through their edges in one order, so no two wait for each other.
    """
    for (source, _), group in sorted(edges.items()):
        number = torch.zeros(1, device=device)
        call = dist.isend if source == rank else dist.irecv
        for work in dist.batch_isend_irecv([dist.P2POp(call, number, group=group, group_peer=1 - group.rank())]):
            work.wait()


def watched() -> bool:
    """Whether functions of torch.distributed that post messages are replaced."""
    return not all(_file(function).startswith(_TORCH) for function in (dist.isend, dist.irecv, dist.batch_isend_irecv))


def _file(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else str(code.co_filename)


def _plain(tensor: Tensor) -> Tensor:
    """NCCL has no complex numbers."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
