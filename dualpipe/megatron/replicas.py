"""Checks that the two replicas of a stage are equal, by a checksum of each tensor on the two ranks that hold them.

Under DualPipeV a stage has one replica in a pipeline, so there the only check is that both chunks are updated.

DualPipe keeps the replicas equal, but a program around it can make them differ: by an optimizer over one chunk,
gradients that were not reduced, a buffer that a forward updates.  Training would then go on with two slightly different
replicas, and a checkpoint would hold one of them.  So they are compared after the first update of the weights and at
each save.

The checksum of a tensor is the sum, modulo 2**64, of its elements' bits as integers, each times an odd number that
depends on the element's index.  Two tensors that differ in exactly one element have different checksums.
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
"""Elements that are widened to 64 bits at a time: 32 MiB for their bits and 32 MiB for the factors."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """The checksum of a tensor of any dtype and shape: a 0-dimensional int64 tensor on the same device."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.dtype.is_complex:
        flat = torch.view_as_real(flat).reshape(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), _AT_ONCE):
        part = bits[start : start + _AT_ONCE].to(torch.int64)
        indices = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        total += (part * (indices * 0x5851F42D4C957F2E + 0x14057B7EF767814F)).sum()  # even times index, plus odd: odd
    return total


def state_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers that a checkpoint of the module holds, by name.

    A buffer that is not saved may differ: a replica may count something about its own microbatches in it.
    """
    yield from module.named_parameters()
    for prefix, layer in module.named_modules():
        for name, buffer in layer.named_buffers(recurse=False):
            if name not in layer._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


@dataclass
class ReplicaCheck:
    """Compares this rank's chunks with their replicas on the other rank of the pair.

    ``modules`` are the chunks without wrappers by stage, in order of stage; without ``pair`` there are no replicas.
    ``update_checked`` becomes true once the weights have been updated and the replicas were equal after that.
    """

    modules: Mapping[int, nn.Module]
    pair: dist.ProcessGroup | None
    update_checked: bool = False
    _before: dict[int, list[int]] = field(default_factory=dict)

    def check_step(self, group: dist.ProcessGroup) -> None:
        """Compare the replicas; called once a training step until ``update_checked``.

        It runs after the forwards and before gradients are reduced: all weights are complete by then, even if they are
        gathered during the forwards.  Collective over ``group``, all ranks of the pipeline; all of them raise
        ``RuleError`` if the replicas of any stage differ.
        """
        now, names = self._sums()
        raise_together(self._difference(now, names) or self._half_updated(now), group)
        trains = any(p.requires_grad for module in self.modules.values() for p in module.parameters())
        updated = torch.tensor([int(not trains or (bool(self._before) and now != self._before))], device=self._device)
        dist.all_reduce(updated, op=dist.ReduceOp.MIN, group=group)
        self.update_checked, self._before = bool(updated.item()), self._before or now

    def difference(self) -> str | None:
        """Describe what differs between the two ranks of the pair, the same on both, or return ``None``."""
        return self._difference(*self._sums())

    @property
    def _device(self) -> torch.device:
        return next(parameter.device for module in self.modules.values() for parameter in module.parameters())

    def _sums(self) -> tuple[dict[int, list[int]], dict[int, list[str]]]:
        sums, names = {}, {}
        for stage, module in self.modules.items():
            state = dict(state_of(module))
            names[stage] = list(state)
            sums[stage] = torch.stack([checksum(tensor) for tensor in state.values()]).tolist() if state else []
        return sums, names

    def _difference(self, sums: Mapping[int, list[int]], names: Mapping[int, list[str]]) -> str | None:
        if self.pair is None:
            return None
        sizes = self._exchange([len(sums[stage]) for stage in sums])
        if sizes[0] != sizes[1]:
            return f"the replicas have {sizes[0]} and {sizes[1]} parameters and buffers in stages {list(sums)}"
        first, second = self._exchange([value for stage in sums for value in sums[stage]])
        tensors = [(stage, name) for stage in sums for name in names[stage]]
        wrong = [tensor for tensor, one, other in zip(tensors, first, second, strict=True) if one != other]
        if not wrong:
            return None
        (stage, name), ranks = wrong[0], dist.get_process_group_ranks(self.pair)
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        return f"{name} of stage {stage}{more} differs between ranks {ranks[0]} and {ranks[1]}"

    def _exchange(self, values: list[int]) -> list[list[int]]:
        """The numbers of both ranks of the pair, first those of the rank that holds the lower stage for lane >."""
        mine = torch.tensor(values, dtype=torch.int64, device=self._device)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine, group=self.pair)
        return [each.tolist() for each in both]

    def _half_updated(self, now: Mapping[int, list[int]]) -> str | None:
        """Describe an optimizer over one of the two chunks: every tensor of the other one is unchanged."""
        if not self._before:
            return None
        share = {
            stage: sum(a != b for a, b in zip(now[stage], self._before[stage], strict=True)) / len(now[stage])
            for stage, module in self.modules.items()
            if any(parameter.requires_grad for parameter in module.parameters())
        }
        unchanged = [stage for stage, part in share.items() if part == 0]
        if unchanged and max(share.values()) > 1 / 2:  # an update lost to rounding leaves most tensors of both
            return f"the optimizer updates one chunk of a rank and leaves stage {unchanged[0]} unchanged"
        return None


def replica_check(model: Sequence[nn.Module], stages: Sequence[int], pair: dist.ProcessGroup | None) -> ReplicaCheck:
    """The check of a rank's chunks, however they are wrapped."""
    bare = [getattr(wrapper_of(module), "module", module) for module in model]
    return ReplicaCheck({stage: _innermost(module) for stage, module in zip(stages, bare, strict=True)}, pair)


def _innermost(module: nn.Module) -> nn.Module:
    while isinstance(getattr(module, "module", None), nn.Module):
        module = module.module  # type: ignore[assignment]
    return module


def raise_together(difference: str | None, group: dist.ProcessGroup | None) -> None:
    """Raise ``RuleError`` on every rank of ``group`` (``None``: of the job) if one has found a difference."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    found = torch.tensor([int(difference is not None)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    if not found.item():
        return
    everyone: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, difference, group=group)
    raise RuleError(
        "the two replicas of a stage must hold the same weights and buffers after each step",
        next(each for each in everyone if each is not None),
        "build the optimizer with build_dualpipe_optimizer over both chunks, reduce gradients with Megatron's "
        "finalize_model_grads, and leave out modules whose forward updates a buffer, such as BatchNorm",
    )


def gather_weights(model: Sequence[nn.Module]) -> None:
    """Finish the gathering of weights that ``overlap_param_gather`` leaves to the next forward.

    Until then a replica holds the new weights of its own shard only.  Collective over the replicas of each chunk.
    """
    for module in model:
        settings = getattr(module, "ddp_config", None)
        if settings is not None and settings.use_distributed_optimizer and settings.overlap_param_gather:
            module.start_param_sync(force_sync=True)  # type: ignore[operator]
