"""What the browser needs to draw a schedule, as small JSON.

The dependency rule stays in ``Schedule.needs``: the page gets each op's needs as numbers, and knows no rule of its own.

==========  =====================================================================================================
programs    for each rank its slots in the text form; the lane ``<`` is written ``{``, which HTML leaves alone
times       for each rank and slot two numbers: the pause between the slot before and this one, and how long it takes
reached     for each rank how many slots ended.  The next one lasts until ``line``; the slots after that are never
            reached, and are drawn after it in program order
stuck       the time at which the last op ended, or null for a schedule that reaches its end
line        the time at which the page draws the line behind which nothing is reached
needs       for each op, ``;`` between: the needed ops, each as its distance back in the list of all ops, or as ``?``
            and its text where the schedule has no such op
peers       for each message op the rank at the other end, for each collective its group, or null
meets       the numbers of a send and of the receive that it matches, for one message after the other
waits       blocked ranks: the number of the op at which each is blocked, and the reason
changed     for each rank the slots that the other schedule does not have
tones       for each lane the tone of each stage, by number (``dualpipe.timeline.chart.Tone``); ``names`` has the tones'
==========  =====================================================================================================
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualpipe.errors import RuleError
from dualpipe.page.model import Mark
from dualpipe.schedule import COMPUTE, MESSAGES, Op, Placed, Schedule, show_slot
from dualpipe.timeline.chart import Tone, named, tones
from dualpipe.timeline.simulate import Costs, Stuck, Timeline, Wait, simulate


@dataclass(frozen=True)
class Run:
    """A schedule's run, as far as it gets; ``waits`` is empty if the run reached the end."""

    timeline: Timeline
    waits: tuple[Wait, ...] = ()


def run(schedule: Schedule, costs: Costs, blocking: bool) -> Run:
    """Simulate a schedule; if it gets stuck, up to that point and with the ranks that wait."""
    try:
        return Run(simulate(schedule, costs, blocking=blocking))
    except Stuck as stuck:
        return Run(stuck.reached, stuck.waits)


def drawing(ran: Run, changed: Iterable[tuple[int, int]] = ()) -> dict[str, Any]:
    """The JSON of one schedule.  ``changed`` has the rank and number of slots to highlight."""
    timeline = ran.timeline
    schedule = timeline.schedule
    line = timeline.makespan + _gap(timeline.costs)
    placed = list(schedule)
    numbers = {(at.rank, at.slot, at.position): number for number, at in enumerate(placed)}
    looks = tones(schedule)
    highlighted: list[list[int]] = [[] for _ in schedule.programs]
    for rank, slot in changed:
        highlighted[rank].append(slot)
    return {
        "programs": [" ".join(map(show_slot, program)).replace("<", "{") for program in schedule.programs],
        "times": [_times(timeline, rank, line) for rank in range(schedule.ranks)],
        "reached": [len(spans) for spans in timeline.spans],
        "stuck": timeline.makespan if ran.waits else None,
        "line": line if ran.waits else timeline.makespan,
        "costs": {str(kind): getattr(timeline.costs, kind) for kind in sorted(COMPUTE)},
        "needs": _needs(schedule, placed),
        "peers": [
            schedule.peer(at.op) if at.op.kind in MESSAGES else at.op.peer for at in placed if at.op.kind not in COMPUTE
        ],
        "meets": [numbers[at[:3]] for message in timeline.messages for at in (message.send, message.receive)],
        "waits": [[numbers[wait.at[:3]], str(wait)] for wait in ran.waits],
        "changed": highlighted,
        "tones": _tones(schedule, looks),
        "names": named(looks),
    }


def marked(schedule: Schedule, mark: Mark) -> dict[str, Any]:
    """The JSON of a mark: the numbers of the ops at both ends.

    Raises
    ------
    RuleError
        If it points at a rank, a slot or an op that the schedule does not have.
    """
    starts = _starts(schedule)
    target = mark.peer_rank is not None and mark.peer_slot is not None
    return {
        "sentence": mark.sentence,
        "at": _ops(schedule, starts, mark.rank, mark.slot, mark.op),
        "to": _ops(schedule, starts, mark.peer_rank or 0, mark.peer_slot or 0, mark.peer_op) if target else [],
        "peer": mark.peer_rank,
    }


def _starts(schedule: Schedule) -> list[list[int]]:
    """For each rank and slot the number of its first op."""
    starts: list[list[int]] = []
    number = 0
    for program in schedule.programs:
        starts.append([])
        for slot in program:
            starts[-1].append(number)
            number += len(slot)
    return starts


def _ops(schedule: Schedule, starts: list[list[int]], rank: int, slot: int, op: str) -> list[int]:
    if not (0 <= rank < schedule.ranks and 0 <= slot < len(schedule.programs[rank])):
        raise RuleError(
            "a mark points at a slot of the schedule", f"there is no slot {slot} of rank {rank}", "correct the mark"
        )
    ops, first = schedule.programs[rank][slot], starts[rank][slot]
    found = [first + position for position, other in enumerate(ops) if op in ("", str(other), str(other.bare))]
    if not found:
        raise RuleError(
            "a mark names an op of its slot",
            f"slot {slot} of rank {rank} is {show_slot(ops)}, not {op}",
            "name one of them",
        )
    return found[-1:] if op else found


def _times(timeline: Timeline, rank: int, line: float) -> list[float]:
    program, spans = timeline.schedule.programs[rank], timeline.spans[rank]
    shown = [(span.start, span.end) for span in spans]
    stopped = spans[-1].end if spans else 0.0
    shown += [(stopped, line)] if len(spans) < len(program) else []
    clock = line + _gap(timeline.costs) / 4
    for slot in program[len(shown) :]:
        takes = timeline.costs.slot(slot) if slot[0].kind in COMPUTE else 0.0
        shown.append((clock, clock + takes))
        clock += takes
    times: list[float] = []
    before = 0.0
    for start, end in ((round(start, 4), round(end, 4)) for start, end in shown):
        times += [_short(start - before), _short(end - start)]
        before = end
    return times


def _gap(costs: Costs) -> float:
    """How long a blocked rank is drawn to wait after its last op."""
    return max(costs.F, costs.B, costs.W)


def _short(number: float) -> float:
    rounded = round(number, 4)
    return int(rounded) if rounded == int(rounded) else rounded


def _tones(schedule: Schedule, looks: Mapping[Tone, tuple[int, ...]]) -> dict[str, list[int]]:
    of = {(look.lane, stage): number for number, (look, stages) in enumerate(looks.items()) for stage in stages}
    return {str(lane): [of[lane, stage] for stage in range(len(schedule.routes[lane]))] for lane in schedule.lanes}


def _needs(schedule: Schedule, placed: Sequence[Placed]) -> str:
    where: defaultdict[Op, list[int]] = defaultdict(list)
    for number, at in enumerate(placed):
        where[at.op.bare].append(number)
    needed = []
    for number, at in enumerate(placed):
        needs = (_distance(placed, where, number, need) for need in schedule.needs(at.op))
        needed.append(",".join(needs))
    return ";".join(needed)


def _distance(placed: Sequence[Placed], where: dict[Op, list[int]], number: int, need: Op) -> str:
    """How far back the needed op is: the nearest one before on the same rank, else the first of all."""
    found = where.get(need)
    if not found:
        return f"?{need}".replace("<", "{")
    rank = placed[number].rank
    here = [other for other in found if other < number and placed[other].rank == rank]
    return str(number - (here[-1] if here else found[0]))
