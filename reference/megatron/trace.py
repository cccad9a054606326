"""The results of each training step on Megatron that are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

Tensors = Mapping[str, Tensor]


class Shard(NamedTuple):
    """A part of a model: the replica, the stage and the tensor or context parallel rank that hold it."""

    replica: int
    stage: int
    tp: int

    def __str__(self) -> str:
        return f"replica {self.replica}, stage {self.stage}, tensor rank {self.tp}"

    def locate(self, name: str) -> str:
        """Describe a parameter of this shard, within its stage."""
        return f"{name} (replica {self.replica}, tensor rank {self.tp})"


class Microbatch(NamedTuple):
    """A microbatch by its replica and its number there."""

    replica: int
    number: int


@dataclass
class StepTrace:
    """One step, as seen on one rank or on all.  Tensors are detached and on the CPU.

    ``losses``: the sum over a microbatch's unmasked tokens, and their number, float32 ``[2]``, once for each time it
    was returned.  By shard and parameter name: ``gradients``, the whole ``main_grad`` when the schedule returns,
    reduced over the replicas; ``weights`` after the optimizer's step; ``main_weights``, the optimizer's float32 copies,
    if it keeps any (under the distributed optimizer the replica's own part).  By one shard of each rank: ``norms``, the
    gradient norm that the optimizer returned, ``done``, whether it made its step, and ``logits``, the largest attention
    logit by which queries and keys were clipped.
    """

    losses: dict[Microbatch, list[Tensor]] = field(default_factory=dict)
    gradients: dict[Shard, Tensors] = field(default_factory=dict)
    weights: dict[Shard, Tensors] = field(default_factory=dict)
    main_weights: dict[Shard, Tensors] = field(default_factory=dict)
    norms: dict[Shard, float] = field(default_factory=dict)
    done: dict[Shard, bool] = field(default_factory=dict)
    logits: dict[Shard, float] = field(default_factory=dict)


def merge(ranks: Sequence[Sequence[StepTrace]]) -> list[StepTrace]:
    """Merge the steps of all ranks.  Losses that several ranks report are all kept."""
    merged = []
    for parts in zip(*ranks, strict=True):
        whole = StepTrace()
        for part in parts:
            for microbatch, found in part.losses.items():
                whole.losses.setdefault(microbatch, []).extend(found)
            whole.gradients |= part.gradients
            whole.weights |= part.weights
            whole.main_weights |= part.main_weights
            whole.norms |= part.norms
            whole.done |= part.done
            whole.logits |= part.logits
        merged.append(whole)
    return merged
