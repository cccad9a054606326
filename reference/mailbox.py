"""Messages between fake ranks, without tags: from one rank to another the k-th send matches the k-th receive."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dualpipe.schedule import SENDS, Op
from reference.fault import Misstep


class Layout(NamedTuple):
    """The shape and dtype of a message."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.shape, tensor.dtype)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(eq=False)
class Message:
    """One end of a message: a send with its payload, or a receive, which has its payload once it is matched."""

    rank: int
    slot: int
    op: Op
    peer: int
    layout: Layout
    payload: Tensor | None = None
    matched: bool = False


class Mailbox:
    """Where both ends are posted; it keeps those that are not matched yet."""

    def __init__(self) -> None:
        self._sends: defaultdict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self._receives: defaultdict[tuple[int, int], deque[Message]] = defaultdict(deque)

    def post(self, message: Message) -> None:
        """Post one end and match it if its partner is there.  Raises ``Misstep`` for different shapes or dtypes."""
        sending = message.op.kind in SENDS
        pair = (message.rank, message.peer) if sending else (message.peer, message.rank)
        (self._sends if sending else self._receives)[pair].append(message)
        if self._sends[pair] and self._receives[pair]:
            _match(self._sends[pair].popleft(), self._receives[pair].popleft())


def _match(send: Message, receive: Message) -> None:
    if send.layout != receive.layout:
        raise Misstep(
            receive.rank,
            receive.slot,
            receive.op,
            "a message has the shape and dtype that its receiver expects",
            f"expects {receive.layout}, and {send.op} of rank {send.rank}, slot {send.slot}, sends {send.layout}",
            "pair a receive with the send of the same stage boundary",
        )
    assert send.payload is not None
    receive.payload = send.payload.clone(memory_format=torch.contiguous_format)
    send.payload = None
    send.matched = receive.matched = True
