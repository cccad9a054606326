"""What a party has to show for each step of training on Megatron."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

Tensors = Mapping[str, Tensor]


class Place(NamedTuple):
    """A piece of a model: which of the replicas, which stage, which tensor parallel rank."""

    replica: int
    stage: int
    tp: int

    def __str__(self) -> str:
        return f"replica {self.replica}, stage {self.stage}, tensor rank {self.tp}"


class Microbatch(NamedTuple):
    """A microbatch by its replica and its number there."""

    replica: int
    number: int


@dataclass
class StepTrace:
    """One step, as seen on one rank or on all.  Tensors are detached, on the CPU.

    ``losses``: the sum over a microbatch's unmasked tokens, and their number, float32 ``[2]``, each as often as it was
    returned.  By place and parameter name: ``gradients``, the whole ``main_grad`` when the schedule returns, reduced
    over the replicas; ``weights`` after the optimizer's step; ``main_weights``, the optimizer's float32 copies, where
    it keeps any (under the distributed optimizer the replica's own shard).  By one place of each rank: ``norms``, the
    gradient norm that the optimizer returned, and ``done``, whether it made its step.
    """

    losses: dict[Microbatch, list[Tensor]] = field(default_factory=dict)
    gradients: dict[Place, Tensors] = field(default_factory=dict)
    weights: dict[Place, Tensors] = field(default_factory=dict)
    main_weights: dict[Place, Tensors] = field(default_factory=dict)
    norms: dict[Place, float] = field(default_factory=dict)
    done: dict[Place, bool] = field(default_factory=dict)


def merge(ranks: Sequence[Sequence[StepTrace]]) -> list[StepTrace]:
    """The steps of all ranks from each rank's own.  Losses that several ranks report are kept side by side."""
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
        merged.append(whole)
    return merged
