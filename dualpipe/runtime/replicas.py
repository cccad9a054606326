"""The replicas of a stage: their gradients are added, and their weights are the same.

With two lanes every stage exists twice, on rank r for one lane and on its mirror P-1-r for the other.  Each replica
gathers the gradient of its own lane; the sum over the lanes, in the schedule's order of lanes, is the gradient of
the model.  Both replicas compute that same sum of the same two numbers, so they stay equal bit by bit.

That holds as long as they started equal and nothing but the optimizer changes them.  With the gradients the replicas
exchange a digest of each weight (once) and of each buffer that has changed, so that replicas that differ are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from dualpipe.errors import StageError
from dualpipe.runtime.modules import Stages
from dualpipe.runtime.transport import Message, TensorSpec, Transport
from dualpipe.schedule import Lane, Schedule

_CHUNK = 1 << 20
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as a signed number: it spreads the places


class Replicas:
    """Keeps the replicas of one rank's stages equal to those on other ranks."""

    def __init__(self, schedule: Schedule, stages: Stages, transport: Transport) -> None:
        self._schedule, self._stages, self._transport = schedule, stages, transport
        self._compared: dict[tuple[nn.Module, str], tuple[TensorWeakRef, int, int]] = {}

    def reduce_gradients(self) -> None:
        """Give every parameter the sum of its gradients over the lanes.

        One message each way per pair of replicas, all of a rank's at once.  A parameter without a gradient on either
        replica keeps none; on one only, it gets the other's.  Raises ``StageError`` where the replicas differ in a
        weight before the first reduction, or in a buffer that has changed since the last one.
        """
        self._combine(self._pack_gradients, self._add_gradients)

    def copy_weights(self) -> None:
        """Give every replica of a stage the weights and buffers of the first lane's."""
        self._combine(_pack_weights, _take_first_weights)

    def _combine(
        self, pack: Callable[[nn.Module], Tensor], unpack: Callable[[int, nn.Module, Mapping[Lane, Tensor]], None]
    ) -> None:
        """Exchange ``pack(module)`` between the replicas of each stage and ``unpack`` all of them, in order of lanes.

        Both ranks of a pair go through their common stages in the same order, so the messages meet untagged.
        """
        schedule, transport = self._schedule, self._transport
        if len(schedule.routes) < 2:
            return
        mine = {held: pack(module) for held, module in sorted(self._stages.items(), key=lambda item: item[0][1])}
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
        arrived = {held: transport.wait(m)[0] if isinstance(m, Message) else m for held, m in theirs.items()}
        for (lane, stage), packed in mine.items():
            module = self._stages[lane, stage]
            unpack(stage, module, {o: packed if o == lane else arrived[o, stage] for o in schedule.lanes})
        transport.drain()

    def _pack_gradients(self, module: nn.Module) -> Tensor:
        """Whether each parameter has a gradient (a byte), the digests of the state (8 bytes each), the gradients."""
        _require_gradients(module)
        state = _state(module)
        parameters = _trained(state)
        flags = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        if not state:
            return flags
        device = next(iter(state.values())).device
        digests = torch.zeros(len(state), dtype=torch.int64, device=device)
        for number, (name, tensor) in enumerate(state.items()):
            digest = self._digest(module, name, tensor)
            if digest is not None:
                digests[number] = digest
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([flags.to(device), digests.view(torch.uint8), *(_bytes(g).to(device) for g in gradients)])

    def _digest(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
        """The digest of a tensor that was not compared yet or, if it is a buffer, has changed since; else ``None``.

        int64 of no dimensions, computed on the tensor's device.  An optimizer changes parameters, and in both
        replicas alike, as their gradients are the same.
        """
        before = self._compared.get((module, name))
        if before is not None:
            same = before[0]() is tensor and before[1:] == (tensor._version, tensor.data_ptr())
            if same or isinstance(tensor, nn.Parameter):
                return None
        self._compared[module, name] = TensorWeakRef(tensor), tensor._version, tensor.data_ptr()
        return _digest(tensor)

    def _add_gradients(self, stage: int, module: nn.Module, replicas: Mapping[Lane, Tensor]) -> None:
        state = _state(module)
        parameters = _trained(state)
        first = len(parameters)
        offset = first + 8 * len(state)
        one, *others = (replica[first:offset] for replica in replicas.values())
        if not all(torch.equal(one, other) for other in others):
            digests = [digest.clone().view(torch.int64).tolist() for digest in (one, *others)]
            for (name, tensor), *found in zip(state.items(), *digests, strict=True):
                if len(set(found)) > 1:
                    raise _differ(stage, name, isinstance(tensor, nn.Parameter))
        present = [replica[:first].tolist() for replica in replicas.values()]
        for index, parameter in enumerate(parameters):
            size = parameter.numel() * parameter.element_size()
            total: Tensor | None = None
            for replica, flags in zip(replicas.values(), present, strict=True):
                if flags[index]:
                    gradient = _like(replica[offset : offset + size], parameter)
                    total = gradient if total is None else total + gradient
            parameter.grad = total
            offset += size


def _differ(stage: int, name: str, weight: bool) -> StageError:
    if weight:
        return StageError(
            "the replicas of a stage start from the same weights",
            f"{name} of stage {stage} differs between the lanes before the first update",
            "call copy_weights() on every rank before the first step; a forward must not change weights",
        )
    return StageError(
        "the replicas of a stage have the same buffers",
        f"{name} of stage {stage} is changed by its forward, and each lane's replica has changed it in its own way",
        "use a layer without running statistics, or put that layer into eval() mode",
    )


def _require_gradients(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise StageError(
                "gradients that are summed over the lanes are dense tensors",
                f"that of {name} is {parameter.grad.layout}",
                "set sparse=False in its layer, or sum the gradients yourself (reduce_gradients=False)",
            )
        if parameter.grad is None and getattr(parameter, "main_grad", None) is not None:
            raise StageError(
                "gradients that are summed over the lanes are in .grad",
                f"{name} has a main_grad and no .grad: a hook has moved it",
                "leave it in .grad until after the step, or sum them yourself (reduce_gradients=False)",
            )


def _trained(state: Mapping[str, Tensor]) -> list[nn.Parameter]:
    return [tensor for tensor in state.values() if isinstance(tensor, nn.Parameter) and tensor.requires_grad]


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _pack_weights(module: nn.Module) -> Tensor:
    pieces = [_bytes(tensor.detach()) for tensor in _state(module).values()]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.uint8)


def _take_first_weights(stage: int, module: nn.Module, replicas: Mapping[Lane, Tensor]) -> None:
    first, offset = next(iter(replicas.values())), 0
    with torch.no_grad():
        for tensor in _state(module).values():
            size = tensor.numel() * tensor.element_size()
            tensor.copy_(_like(first[offset : offset + size], tensor))
            offset += size


def _digest(tensor: Tensor) -> Tensor:
    """A sum over the tensor's bytes, eight at a time, each multiplied by an odd number of its place (modulo 2^64)."""
    data = _bytes(tensor.detach())
    words = torch.cat([data, data.new_zeros(-data.numel() % 8)]).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK]
        places = torch.arange(start, start + part.numel(), device=tensor.device)
        total = total + ((places * _SPREAD) | 1).mul_(part).sum()
    return total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _like(data: Tensor, tensor: Tensor) -> Tensor:
    """``data`` with the dtype and shape of ``tensor``, in storage of its own (a slice may be misaligned)."""
    return data.clone().view(tensor.dtype).view(tensor.shape)
