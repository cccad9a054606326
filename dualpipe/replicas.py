"""The two copies of a stage: their gradients are added, and their weights are the same.

With two lanes every stage exists twice, on rank r for one lane and on its mirror P-1-r for the other.  Each copy
gathers the gradient of its own lane; the sum over the lanes, in the schedule's order of lanes, is the gradient of
the model.  Both copies compute that same sum of the same two numbers, so they stay equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dualpipe.modules import Stages
from dualpipe.schedule import Lane, Schedule
from dualpipe.transport import Message, TensorSpec, Transport


def reduce_gradients(schedule: Schedule, stages: Stages, transport: Transport) -> None:
    """Give every parameter the sum of its gradients over the lanes.

    One message each way per pair of copies, all of a rank's at once.  A parameter without a gradient on either copy
    keeps none; on one copy only, it gets the other's.
    """
    _combine(schedule, stages, transport, _pack_gradients, _add_gradients)


def copy_weights(schedule: Schedule, stages: Stages, transport: Transport) -> None:
    """Give every copy of a stage the weights and buffers of the first lane's copy."""
    _combine(schedule, stages, transport, _pack_weights, _take_first_weights)


Pack = Callable[[nn.Module], Tensor]
Unpack = Callable[[nn.Module, Sequence[Tensor]], None]


def _combine(schedule: Schedule, stages: Stages, transport: Transport, pack: Pack, unpack: Unpack) -> None:
    """Exchange ``pack(module)`` between the copies of each stage and ``unpack`` all of them, in order of lanes.

    Both ranks of a pair go through their common stages in the same order, so the messages meet untagged.
    """
    if len(schedule.routes) < 2:
        return
    mine = {held: pack(module) for held, module in sorted(stages.items(), key=lambda item: item[0][1])}
    theirs: dict[tuple[Lane, int], Message | Tensor] = {}
    messages: list[Message] = []
    for (lane, stage), packed in mine.items():
        for other in schedule.lanes:
            route = schedule.routes[other]
            if other == lane:
                continue
            if route[stage] == transport.rank:
                theirs[other, stage] = mine[other, stage]
                continue
            label, peer = f"copy {lane} of stage {stage}", route[stage]
            specs = [TensorSpec(tuple(packed.shape), packed.dtype)]
            arrival = Message(f"copy {other} of stage {stage}", peer, sends=False, specs=specs)
            messages += [Message(label, peer, sends=True, tensors=(packed,)), arrival]
            theirs[other, stage] = arrival
    transport.post(messages)
    arrived = {held: transport.wait(copy)[0] if isinstance(copy, Message) else copy for held, copy in theirs.items()}
    for (lane, stage), packed in mine.items():
        module = stages[lane, stage]
        unpack(module, [packed if other == lane else arrived[other, stage] for other in schedule.lanes])
    transport.drain()


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _pack_gradients(module: nn.Module) -> Tensor:
    """The gradients one after the other as bytes, behind one byte each that says whether there is one."""
    parameters = _trained(module)
    flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    if not parameters:
        return flags
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return torch.cat([flags.to(parameters[0].device), *(_bytes(g) for g in gradients)])


def _add_gradients(module: nn.Module, copies: Sequence[Tensor]) -> None:
    parameters = _trained(module)
    present = [copy[: len(parameters)].tolist() for copy in copies]
    offset = len(parameters)
    for index, parameter in enumerate(parameters):
        size = parameter.numel() * parameter.element_size()
        total: Tensor | None = None
        for copy, flags in zip(copies, present, strict=True):
            if flags[index]:
                gradient = _unbytes(copy[offset : offset + size], parameter)
                total = gradient if total is None else total + gradient
        parameter.grad = total
        offset += size


def _state(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _pack_weights(module: nn.Module) -> Tensor:
    pieces = [_bytes(tensor.detach()) for tensor in _state(module)]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)


def _take_first_weights(module: nn.Module, copies: Sequence[Tensor]) -> None:
    offset = 0
    with torch.no_grad():
        for tensor in _state(module):
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(_unbytes(copies[0][offset : offset + size], tensor))
            offset += size


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _unbytes(data: Tensor, like: Tensor) -> Tensor:
    """``data`` as a tensor of the dtype and shape of ``like``, in storage of its own (a slice may be misaligned)."""
    return data.clone().view(like.dtype).view(like.shape)
