"""Which microbatches of a step begin with the same data, as when a lane gets the half of the other one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from dualpipe.record.plain.links import Plainly
from dualpipe.schedule import Lane, Task

_SHOWN = 3


def repeated(forwards: Mapping[Task, Plainly]) -> list[tuple[Task, Task]]:
    """The pairs of microbatches whose first stages took bitwise the same tensors."""
    begins = sorted((task, found["data"]) for task, found in forwards.items() if not task.stage and found.get("data"))
    return [(one, other) for (one, data), (other, same) in combinations(begins, 2) if data == same]


def are_those_of_the_other_lane(forwards: Mapping[Task, Plainly]) -> bool:
    """Whether the lanes begin with the same data, microbatch by microbatch."""
    both = {one.mb for one, other in repeated(forwards) if one.lane != other.lane and one.mb == other.mb}
    return bool(both) and both == {task.mb for task in forwards if not task.stage}


def note(forwards: Mapping[Task, Plainly], lane: Lane) -> str:
    """What to say of the microbatches of a lane; empty if all begin with data of their own."""
    pairs = [(one, other) for one, other in repeated(forwards) if one.lane == lane]
    shown = [f"{one.mb} and {other.mb}" + f" of lane {other.lane}" * (other.lane != lane) for one, other in pairs]
    more = f" and {len(shown) - _SHOWN} more pairs" if len(shown) > _SHOWN else ""
    return f"microbatches {', '.join(shown[:_SHOWN])}{more} begin with the same data" if shown else ""
