"""Are the two copies of a stage equal?  A checksum of each tensor is compared between the two ranks that hold them.

Nothing of DualPipe lets the copies differ; what a program does around it may: an optimizer over one chunk, gradients
that were not reduced, a buffer that a forward updates.  Then each copy trains on, a little differently, and a
checkpoint holds one of them.  So they are compared after the first update of the weights and at each save.

The checksum of a tensor is the sum of its elements' bits, as integers, each times an odd number that follows from its
place, modulo 2**64.  Two tensors that differ in one element never have the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualpipe.errors import RuleError
from dualpipe.megatron.data_parallel import wrapper_of

_AT_ONCE = 1 << 22
"""Elements whose bits are widened to 64 at a time: 32 MiB each for them and for their factors."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """An int64 without dimensions, on the tensor's device, of the bits of a tensor of any dtype and shape."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.dtype.is_complex:
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].to(torch.int64)
        places = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        total += (part * (places * 0x5851F42D4C957F2E + 0x14057B7EF767814F)).sum()  # even times place, plus odd: odd
    return total


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a checkpoint of the module holds, by name.

    A buffer that is not saved may differ: each copy of a stage may count something of its own microbatches.
    """
    yield from module.named_parameters()
    for prefix, layer in module.named_modules():
        for name, buffer in layer.named_buffers(recurse=False):
            if name not in layer._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


@dataclass
class Copies:
    """The state of one rank's chunks, to be compared with the other rank of the pair.

    ``chunks`` are by stage, in order of stage, without wrappers.  ``moved`` turns true when an update of the weights
    was seen, and the copies were equal after it.
    """

    chunks: Mapping[int, nn.Module]
    pair: dist.ProcessGroup
    moved: bool = False
    _before: dict[int, list[int]] = field(default_factory=dict)

    def follow(self, group: dist.ProcessGroup) -> None:
        """Once a training step, when its forwards have run and gradients are not yet reduced, until ``moved``.

        That is where all weights have arrived, also if they are gathered during the forwards.  Collective over
        ``group``, all ranks of the pipeline; all of them raise ``RuleError`` if the copies of any stage differ.
        """
        now, names = self._sums()
        raise_together(self._difference(now, names) or self._half_moved(now), group)
        trains = any(p.requires_grad for module in self.chunks.values() for p in module.parameters())
        moved = torch.tensor([int(not trains or (bool(self._before) and now != self._before))], device=self._device)
        dist.all_reduce(moved, op=dist.ReduceOp.MIN, group=group)
        self.moved, self._before = bool(moved.item()), self._before or now

    def difference(self) -> str | None:
        """What differs between the two ranks of the pair, told alike on both, or ``None``."""
        return self._difference(*self._sums())

    @property
    def _device(self) -> torch.device:
        return next(parameter.device for module in self.chunks.values() for parameter in module.parameters())

    def _sums(self) -> tuple[dict[int, list[int]], dict[int, list[str]]]:
        sums, names = {}, {}
        for stage, module in self.chunks.items():
            state = dict(state_of(module))
            names[stage] = list(state)
            sums[stage] = torch.stack([checksum(tensor) for tensor in state.values()]).tolist() if state else []
        return sums, names

    def _difference(self, sums: Mapping[int, list[int]], names: Mapping[int, list[str]]) -> str | None:
        sizes = self._exchange([len(sums[stage]) for stage in sums])
        if sizes[0] != sizes[1]:
            return f"the copies have {sizes[0]} and {sizes[1]} parameters and buffers in stages {list(sums)}"
        first, second = self._exchange([value for stage in sums for value in sums[stage]])
        places = [(stage, name) for stage in sums for name in names[stage]]
        wrong = [place for place, one, other in zip(places, first, second, strict=True) if one != other]
        if not wrong:
            return None
        (stage, name), ranks = wrong[0], dist.get_process_group_ranks(self.pair)
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"{name} of stage {stage}{more} differs between ranks {ranks[0]} and {ranks[1]}"

    def _exchange(self, values: list[int]) -> list[list[int]]:
        """These numbers and those of the other rank, lane > of the lower stage first."""
        mine = torch.tensor(values, dtype=torch.int64, device=self._device)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine, group=self.pair)
        return [each.tolist() for each in both]

    def _half_moved(self, now: Mapping[int, list[int]]) -> str | None:
        """An optimizer over one of the two chunks leaves every tensor of the other one as it was."""
        if not self._before:
            return None
        share = {
            stage: sum(a != b for a, b in zip(now[stage], self._before[stage], strict=True)) / len(now[stage])
            for stage, module in self.chunks.items()
            if any(parameter.requires_grad for parameter in module.parameters())
        }
        still = [stage for stage, part in share.items() if part == 0]
        if still and max(share.values()) > 1 / 2:  # a step that rounding swallows leaves most tensors of both
            return f"the optimizer updates one chunk of a rank and leaves stage {still[0]} as it was"
        return None


def copies_of(model: Sequence[nn.Module], stages: Sequence[int], pair: dist.ProcessGroup) -> Copies:
    """The chunks of a rank as what is compared, whatever wraps them."""
    bare = [getattr(wrapper_of(module), "module", module) for module in model]
    return Copies({stage: _innermost(module) for stage, module in zip(stages, bare, strict=True)}, pair)


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    return module


def raise_together(difference: str | None, group: dist.ProcessGroup | None) -> None:
    """Let every rank of ``group`` (``None``: of the job) raise ``RuleError`` if one has found a difference."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found = torch.tensor([int(difference is not None)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    if not found.item():
        return
    everyone: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, difference, group=group)
    raise RuleError(
        "the two copies of a stage hold the same weights and buffers after each step",
        next(each for each in everyone if each is not None),
        "build the optimizer with build_dualpipe_optimizer over both chunks, reduce gradients with Megatron's "
        "finalize_model_grads, and keep modules out whose forward updates a buffer, such as BatchNorm",
    )


def gather_weights(model: Sequence[nn.Module]) -> None:
    """Wait for, or start, the gathering of weights that ``overlap_param_gather`` leaves to the next forward.

    Before that, a replica holds the new weights of its own shard alone.  Collective over the replicas of each chunk.
    """
    for module in model:
        settings = getattr(module, "ddp_config", None)
        if settings is not None and settings.use_distributed_optimizer and settings.overlap_param_gather:
            module.start_param_sync(force_sync=True)  # type: ignore[operator]
