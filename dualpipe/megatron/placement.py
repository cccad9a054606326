"""Which stages of the model each rank of a pipeline holds, and on which lane; everything else follows from it.

::

    4 ranks               0   1   2   3
    dualpipe    lane >    0   1   2   3     two lanes: each stage has two replicas,
                lane <    3   2   1   0     which train on different microbatches
    dualpipev   lane >    0   1   2   3     one lane that turns around at the last rank:
                          7   6   5   4     each stage is held once

A rank holds two chunks.  Its *own* is the stage with its number in lane >, as under Megatron's 1F1B.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from dualpipe.errors import RuleError, nearest
from dualpipe.schedule import UP, Chunk, Lane, Routes
from dualpipe.schedule.generate import PLANS


class Schedules(StrEnum):
    """The schedules that the drop-in runs."""

    DUALPIPE = "dualpipe"
    DUALPIPEV = "dualpipev"


@dataclass(frozen=True)
class Placement:
    """The stages of a pipeline of ``ranks``.  ``schedule`` is the name of the schedule without late W."""

    schedule: Schedules
    ranks: int

    @cached_property
    def routes(self) -> Routes:
        """For each lane the rank that holds stage 0, 1, 2, ..."""
        return Routes(PLANS[self.schedule](self.ranks, 2 * self.ranks, 0).routes)

    @property
    def stages(self) -> int:
        return len(self.routes[UP])

    @property
    def mirrored(self) -> bool:
        """Whether each stage has a replica on the other lane."""
        return len(self.routes) > 1

    def chunks(self, rank: int) -> tuple[Chunk, Chunk]:
        """The two chunks of a rank, in order of stage."""
        held = (
            Chunk(lane, stage)
            for lane, route in self.routes.items()
            for stage, holder in enumerate(route)
            if holder == rank
        )
        low, high = sorted(held, key=lambda chunk: chunk.stage)
        return low, high

    def own(self, rank: int) -> Chunk:
        return Chunk(UP, rank)

    def other(self, rank: int) -> Chunk:
        """The chunk of a rank that is not its own."""
        (chunk,) = (chunk for chunk in self.chunks(rank) if chunk != self.own(rank))
        return chunk

    def ends(self) -> list[tuple[Lane, int]]:
        """For each lane, in the order in which data is dealt, the rank that computes its losses."""
        return [(lane, self.routes[lane][-1]) for lane in Lane if lane in self.routes]


def placement(schedule: str, ranks: int) -> Placement:
    """Raises ``RuleError`` for an unknown schedule, or a number of ranks that it does not run on."""
    if schedule not in tuple(Schedules):
        fix = nearest(str(schedule), list(Schedules), "correct it")
        raise RuleError(f"the schedule must be {' or '.join(Schedules)}", f"got {schedule!r}", fix)
    if schedule == Schedules.DUALPIPE and (ranks < 2 or ranks % 2):
        raise RuleError(
            "DualPipe needs an even number of pipeline ranks, 2 or more",
            f"got a pipeline of {ranks}",
            "set --pipeline-model-parallel-size to an even number, or use DualPipeV",
        )
    return Placement(Schedules(schedule), ranks)


def schedule_of(config_or_args: Any) -> Schedules | None:
    """The schedule that ``use_dualpipe`` or ``use_dualpipev`` selects; ``None`` if neither is set."""
    if getattr(config_or_args, "use_dualpipe", False):
        return Schedules.DUALPIPE
    return Schedules.DUALPIPEV if getattr(config_or_args, "use_dualpipev", False) else None


def stages_of(config_or_args: Any) -> int:
    """The number of stages of the pipeline, which is ``pipeline_model_parallel_size`` of the ``TransformerConfig``.

    Under DualPipeV it is twice the number of pipeline ranks, otherwise the number of ranks.
    """
    ranks = int(getattr(config_or_args, "pipeline_model_parallel_size", None) or 1)
    return 2 * ranks if schedule_of(config_or_args) is Schedules.DUALPIPEV else ranks
