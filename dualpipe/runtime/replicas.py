"""The replicas of a stage: their gradients are summed, and their weights stay equal.

With two lanes every stage has two replicas, on rank r for one lane and on its mirror P-1-r for the other.  Each one
accumulates the gradient of its own lane.  The sum over the lanes, in the schedule's order of lanes, is the gradient of
the model.  Both replicas compute that same sum of the same two numbers, so they stay equal bit by bit.

This holds as long as they start equal and only the optimizer changes them.  With the gradients the replicas exchange a
digest of each weight (once) and of each buffer that has changed, so that replicas that differ are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from dualpipe.errors import StageError
from dualpipe.runtime.modules import Stages
from dualpipe.runtime.transport import Message, TensorSpec, Transport, writes
from dualpipe.schedule import Chunk, Lane, Schedule

_WORDS_AT_ONCE = 1 << 20
_SPREAD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio, as a signed number; it spreads the factors


class Replicas:
    """Keeps the replicas of one rank's stages equal to those on other ranks."""

    def __init__(self, schedule: Schedule, stages: Stages, transport: Transport) -> None:
        self._schedule, self._stages, self._transport = schedule, stages, transport
        self._compared: dict[tuple[nn.Module, str], tuple[TensorWeakRef, int, int]] = {}

    def reduce_gradients(self) -> None:
        """Give every parameter the sum of its gradients over the lanes.

        Each pair of replicas exchanges one message each way, and a rank posts all of its messages at once.  If only one
        replica has a gradient for a parameter, both get it; if neither has one, ``.grad`` stays ``None``.  Raises
        ``StageError`` if the replicas differ in a weight before the first reduction, or in a buffer that has changed
        since the last one.
        """
        self._combine(self._pack_gradients, self._add_gradients)

    def copy_weights(self) -> None:
        """Give every replica of a stage the weights and buffers of the first lane's replica."""
        self._combine(_pack_weights, _take_first_weights)

    def _combine(
        self, pack: Callable[[nn.Module], Tensor], unpack: Callable[[int, nn.Module, Mapping[Lane, Tensor]], None]
    ) -> None:
        """Exchange ``pack(module)`` between the replicas of each stage and ``unpack`` all of them, in order of lanes.

        Both ranks of a pair go through their common stages in the same order, so the messages match without tags.
        """
        schedule, transport = self._schedule, self._transport
        if len(schedule.routes) < 2:
            return
        mine = {chunk: pack(module) for chunk, module in sorted(self._stages.items(), key=lambda item: item[0].stage)}
        theirs: dict[Chunk, Message | Tensor] = {}
        messages: list[Message] = []
        for chunk, packed in mine.items():
            specs = [TensorSpec(tuple(packed.shape), packed.dtype)]
            for lane in schedule.lanes:
                replica, peer = Chunk(lane, chunk.stage), schedule.routes[lane][chunk.stage]
                if replica == chunk:
                    continue
                if peer == transport.rank:
                    theirs[replica] = mine[replica]
                    continue
                receive = Message(str(replica), peer, sends=False, specs=specs)
                messages += [Message(str(chunk), peer, sends=True, tensors=(packed,)), receive]
                theirs[replica] = receive
        transport.post(messages)
        received = {chunk: transport.wait(m)[0] if isinstance(m, Message) else m for chunk, m in theirs.items()}
        for chunk, packed in mine.items():
            of_lane = {Chunk(lane, chunk.stage): lane for lane in schedule.lanes}
            packs = {lane: packed if replica == chunk else received[replica] for replica, lane in of_lane.items()}
            unpack(chunk.stage, self._stages[chunk], packs)
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
        """The digest of a tensor that was not compared yet, or of a buffer that was changed since then; else ``None``.

        An int64 scalar, computed on the tensor's device.  Parameters are compared once: later the optimizer changes
        them, in both replicas alike, as their gradients are equal.
        """
        before = self._compared.get((module, name))
        if before is not None:
            same = before[0]() is tensor and before[1:] == (writes(tensor), tensor.data_ptr())
            if same or isinstance(tensor, nn.Parameter):
                return None
        self._compared[module, name] = TensorWeakRef(tensor), writes(tensor), tensor.data_ptr()
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
            "the replicas of a stage must start from the same weights",
            f"{name} of stage {stage} differs between the lanes before the first update",
            "call copy_weights() on every rank before the first step; a forward must not change weights",
        )
    return StageError(
        "the replicas of a stage must have the same buffers",
        f"{name} of stage {stage} is changed by its forward, and each lane's replica has changed it in its own way",
        "use a layer without running statistics, or put that layer in eval() mode",
    )


def _require_gradients(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise StageError(
                "gradients that are summed over the lanes must be dense tensors",
                f"that of {name} is {parameter.grad.layout}",
                "set sparse=False in its layer, or sum the gradients yourself (reduce_gradients=False)",
            )
        if parameter.grad is None and getattr(parameter, "main_grad", None) is not None:
            raise StageError(
                "gradients that are summed over the lanes must be in .grad",
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
    """The sum of the tensor's 8-byte words, each times an odd factor that depends on its position (modulo 2^64)."""
    data = _bytes(tensor.detach())
    words = torch.cat([data, data.new_zeros(-data.numel() % 8)]).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        part = words[start : start + _WORDS_AT_ONCE]
        positions = torch.arange(start, start + part.numel(), device=tensor.device)
        total = total + ((positions * _SPREAD) | 1).mul_(part).sum()
    return total


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _like(data: Tensor, tensor: Tensor) -> Tensor:
    """``data`` with the dtype and shape of ``tensor``, in its own storage (a slice may be misaligned)."""
    return data.clone().view(tensor.dtype).view(tensor.shape)
