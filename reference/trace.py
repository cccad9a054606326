"""What an implementation that ran a schedule recorded of each training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from dualpipe.schedule import Chunk, Lane, Op
from reference.oracle import Tensors


class Interval(NamedTuple):
    """Start and end in seconds of ``time.monotonic``, which all processes of a Linux machine share."""

    start: float
    end: float


@dataclass(frozen=True)
class StepTimes:
    """One step of one rank: each op in program order, and the waits for receives by label.

    The time of a message op is that of posting its slot; the time of a compute op includes its waits.
    """

    ops: tuple[tuple[Op, Interval], ...]
    waits: Mapping[str, Interval]


@dataclass
class StepTrace:
    """One step, as seen on one rank or on all.  Tensors are detached and on the CPU.

    ``losses[lane][mb]``, without those that the schedule never computes; by chunk and parameter name ``lane_gradients``
    (before the replicas of a stage are reduced), ``gradients`` (after the reduction) and ``weights`` (after the
    optimizer step); by rank ``times``, if the case is timed.
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
