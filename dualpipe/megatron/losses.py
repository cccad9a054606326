"""Sends the losses of lane <, which ends at the first rank, to the last rank, where a training loop reads them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from dualpipe.runtime.transport import Message, TensorSpec, Transport
from dualpipe.schedule import DOWN, UP, Lane

_ABSENT = object()


def collect_losses(collected: Mapping[Lane, list[Any]], transport: Transport, device: torch.device) -> list[Any]:
    """On the last rank, the results of both lanes, each microbatch once, in the order of the data; elsewhere ``[]``.

    Item 2k of the data is microbatch k of lane >, item 2k+1 microbatch k of lane <.
    """
    last = transport.ranks - 1
    if transport.rank == 0:
        _send(collected.get(DOWN, []), last, transport, device)
        return []
    if transport.rank != last:
        return []
    down = _receive(transport, device)
    pairs = zip_longest(collected.get(UP, []), down, fillvalue=_ABSENT)
    return [value for pair in pairs for value in pair if value is not _ABSENT]


def _send(values: list[Any], peer: int, transport: Transport, device: torch.device) -> None:
    data = torch.frombuffer(bytearray(pickle.dumps(detached(values, torch.device("cpu")))), dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    for label, tensor in (("the size of the losses of lane <", size), ("the losses of lane <", data)):
        transport.post([Message(label, peer, sends=True, tensors=(tensor.to(device),))])
    transport.drain()


def _receive(transport: Transport, device: torch.device) -> list[Any]:
    size = _receive_one("the size of the losses of lane <", TensorSpec((1,), torch.int64), transport)
    data = _receive_one("the losses of lane <", TensorSpec((int(size),), torch.uint8), transport)
    transport.drain()
    values: list[Any] = detached(pickle.loads(data.cpu().numpy().tobytes()), device)
    return values


def _receive_one(label: str, spec: TensorSpec, transport: Transport) -> Tensor:
    message = Message(label, 0, sends=False, specs=[spec])
    transport.post([message])
    (tensor,) = transport.wait(message)
    return tensor


def detached(value: Any, device: torch.device | None = None) -> Any:
    """``value`` with every tensor in it detached, so that no graph is kept alive, and moved to ``device``."""
    if isinstance(value, Tensor):
        return value.detach().to(device or value.device)
    if isinstance(value, dict):
        return {key: detached(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [detached(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)  # a NamedTuple takes fields
    return value
