"""What an implementation that ran a schedule recorded of each training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dualpipe.schedule import Chunk, Lane
from reference.stopwatch import StepTimes

Tensors = Mapping[str, Tensor]


@dataclass
class StepTrace:
    """One step, as seen on one rank or on all.  Tensors are detached and on the CPU.

    ``losses[lane][mb]``; by chunk and parameter name ``lane_gradients`` (before the replicas of a stage are reduced),
    ``gradients`` (after the reduction) and ``weights`` (after the optimizer step); by rank ``times``, if the case is
    timed.
    """

    losses: dict[Lane, dict[int, Tensor]] = field(default_factory=dict)
    lane_gradients: dict[Chunk, Tensors] = field(default_factory=dict)
    gradients: dict[Chunk, Tensors] = field(default_factory=dict)
    weights: dict[Chunk, Tensors] = field(default_factory=dict)
    times: dict[int, StepTimes] = field(default_factory=dict)


def merge(ranks: Sequence[Sequence[StepTrace]]) -> list[StepTrace]:
    """The steps of all ranks from each rank's own."""
    merged = []
    for parts in zip(*ranks, strict=True):
        whole = StepTrace()
        for part in parts:
            for lane, losses in part.losses.items():
                whole.losses.setdefault(lane, {}).update(losses)
            whole.lane_gradients |= part.lane_gradients
            whole.gradients |= part.gradients
            whole.weights |= part.weights
            whole.times |= part.times
        merged.append(whole)
    return merged
