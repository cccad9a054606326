"""Reads the schedules of NVIDIA's JaxPP: for each MPMD rank its list of ``Task``.

``jaxpp.schedules`` has classes whose ``tasks(n_mubatches)`` makes such lists.  JaxPP itself is not imported: a task is
any object with the attributes

===========  ==========================================================
stage_id     our stage
mubatch_idx  our microbatch
fwd_or_bwd   an enum or a text: FWD, BWD, BWD_I, BWD_W
===========  ==========================================================

A ``FusedTask`` is an iterable of tasks, and becomes a slot.  ``None`` is an idle step and is left out.  In JaxPP the
compiler adds the messages; here ``lower`` adds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dualpipe.schedule.computes import one_lane
from dualpipe.schedule.op import UP, B, F, Kind, Op, ScheduleError, Slot, W
from dualpipe.schedule.value import Schedule

_KINDS: dict[str, tuple[Kind, ...]] = {"FWD": (F,), "BWD": (B, W), "BWD_I": (B,), "BWD_W": (W,)}


def from_tasks(tasks: Sequence[Iterable[Any]], name: str = "") -> Schedule:
    """The schedule of JaxPP's tasks, with one lane; ``tasks`` has one list for each rank.

    Raises
    ------
    ScheduleError
        If a task has another type; if no rank or two ranks run a stage; and if the order cannot be run (raised by
        ``lower``).
    """
    return one_lane([[*_slots(rank, row)] for rank, row in enumerate(tasks)], name)


def _slots(rank: int, row: Iterable[Any]) -> Iterator[Slot]:
    for task in row:
        if task is not None:
            parts = [task] if hasattr(task, "stage_id") else list(task)
            yield tuple(op for part in parts for op in _ops(rank, part))


def _ops(rank: int, task: Any) -> Slot:
    word = str(getattr(task.fwd_or_bwd, "name", task.fwd_or_bwd))
    if word not in _KINDS:
        got = f"rank {rank} has {word} of microbatch {task.mubatch_idx} at stage {task.stage_id}"
        raise ScheduleError(f"a task's fwd_or_bwd is one of {', '.join(_KINDS)}", got, "use one of these")
    return tuple(Op(kind, UP, task.stage_id, task.mubatch_idx) for kind in _KINDS[word])
