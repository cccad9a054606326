"""Sends the losses of a lane that ends at the first rank to the last rank, where a training loop reads them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from dualpipe.runtime.transport import Message, TensorSpec, Transport
from dualpipe.schedule import Lane

_ABSENT = object()


def collect_losses(
    collected: Mapping[Lane, list[Any]],
    ends: Sequence[tuple[Lane, int]],
    transport: Transport,
    device: torch.device,
) -> list[Any]:
    """On the last rank, the results of all lanes, each microbatch once, in the order of the data; elsewhere ``[]``.

    ``ends`` are the lanes in the order in which data is dealt, each with the rank where its results are.  With two
    lanes, item 2k of the data is microbatch k of lane >, item 2k+1 microbatch k of lane <.
    """
    last = transport.ranks - 1
    found = []
    for lane, rank in ends:
        if transport.rank == last:
            found.append(collected.get(lane, []) if rank == last else _receive(lane, rank, transport, device))
        elif transport.rank == rank:
            _send(collected.get(lane, []), lane, last, transport, device)
    return [value for row in zip_longest(*found, fillvalue=_ABSENT) for value in row if value is not _ABSENT]


def _send(values: list[Any], lane: Lane, peer: int, transport: Transport, device: torch.device) -> None:
    data = torch.frombuffer(bytearray(pickle.dumps(detached(values, torch.device("cpu")))), dtype=torch.uint8)
    size = torch.tensor([data.numel()])
    for label, tensor in ((f"the size of the losses of lane {lane}", size), (f"the losses of lane {lane}", data)):
        transport.post([Message(label, peer, sends=True, tensors=(tensor.to(device),))])
    transport.drain()


def _receive(lane: Lane, peer: int, transport: Transport, device: torch.device) -> list[Any]:
    size = _receive_one(f"the size of the losses of lane {lane}", peer, TensorSpec((1,), torch.int64), transport)
    data = _receive_one(f"the losses of lane {lane}", peer, TensorSpec((int(size),), torch.uint8), transport)
    transport.drain()
    values: list[Any] = detached(pickle.loads(data.cpu().numpy().tobytes()), device)
    return values


def _receive_one(label: str, peer: int, spec: TensorSpec, transport: Transport) -> Tensor:
    message = Message(label, peer, sends=False, specs=[spec])
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
