"""What real processes did when, as recordings, and beside them the simulation of the same schedule.

Every step is one recording, laid at the time at which its first rank began.  Clocks need no alignment: the ranks are
processes of one machine and read one clock, and a barrier lets them start a step together.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dualpipe.schedule import COMPUTE, RECEIVES, SENDS, B, F, Op, Placed, Schedule, W
from dualpipe.timeline import perfetto
from dualpipe.timeline.perfetto import Scaled
from dualpipe.timeline.run_log import Idle, Recording, Work, simulated
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.summary import describe_costs, headline
from dualpipe.timeline.timeline import Costs, Message
from reference.stopwatch import StepTimes, Stretch
from reference.verify import PROCESSES, Report

MICROSECONDS = 1e6
"""In a second."""
MEASURED = "measured"

_WITH = "B and W are one call of autograd here: the time of {} is in it"
_WITHIN = "part of {}: B and W are one call of autograd here, so this lasts next to no time of its own"


def trace_of(report: Report) -> str | None:
    """The trace of a timed verification as JSON; ``None`` where the processes did not finish."""
    steps = [step.times for party in report.parties if party.name == PROCESSES for step in party.traces]
    if not steps:
        return None
    schedule = report.case.schedule
    return perfetto.dumps(trace(schedule, steps, report.case.blocking, report.case.device))


def trace(schedule: Schedule, steps: Sequence[Mapping[int, StepTimes]], blocking: bool, device: str) -> dict[str, Any]:
    """The measured steps, and the simulation with the median costs that they had; one process of the trace each."""
    begin = min(_zero(step) for step in steps)
    found = [measured(schedule, step) for step in steps]
    costs = median_costs(found)
    name, sizes = headline(schedule)
    ideal = simulated(simulate(schedule, costs, blocking=blocking), "simulated with the median costs")
    parts = []
    for step, recording in zip(steps, found, strict=True):
        offset = (_zero(step) - begin) * MICROSECONDS
        parts += [Scaled(recording, MICROSECONDS, offset), Scaled(ideal, MICROSECONDS, offset)]
    about = {
        "schedule": name,
        "sizes": sizes,
        "scale": "microseconds of time.monotonic since the first op of the first step",
        "costs": f"{describe_costs(costs)} (seconds, the median of each kind)",
        "device": device if device == "cpu" else f"{device}: an op's time is that of launching its work",
    }
    return perfetto.trace(parts, about)


def measured(schedule: Schedule, step: Mapping[int, StepTimes]) -> Recording:
    """One step as a recording in seconds since its first op.  A wait comes before the op that needed it."""
    zero = _zero(step)
    work: list[Work] = []
    idle: list[Idle] = []
    sends: defaultdict[tuple[int, int], deque[tuple[Placed, float]]] = defaultdict(deque)
    receives: list[tuple[Placed, int, float, float]] = []
    for rank, program in enumerate(schedule.programs):
        times = step[rank]
        places = [Placed(rank, number, at, op) for number, slot in enumerate(program) for at, op in enumerate(slot)]
        for at, (op, (start, end)) in zip(places, times.ops, strict=True):
            if at.op != op:
                raise AssertionError(f"rank {rank} tells of {op} where the schedule has {at.op}")
            if op.kind in COMPUTE:
                waits = _waits(schedule, op, times.waits, start)
                idle += [Idle(rank, wait.start - zero, wait.end - zero, need) for need, wait in waits]
                start = max([start, *(wait.end for _, wait in waits)])
                work.append(Work(at, start - zero, end - zero, _note(program[at.slot], op)))
                continue
            peer = schedule.peer(op)
            assert peer is not None, "a message that ran had a peer"
            if op.kind in SENDS:
                sends[rank, peer].append((at, start - zero))
            else:
                receives.append((at, peer, start - zero, times.waits[str(op.bare)].end - zero))
    messages = []
    for at, peer, awaited, completed in receives:
        send, sent = sends[peer, at.rank].popleft()
        messages.append(Message(send, at, sent, awaited, completed))
    return Recording(MEASURED, schedule, tuple(work), tuple(idle), tuple(messages))


def median_costs(recordings: Sequence[Recording]) -> Costs:
    """The median time of each kind: F, split B and W, and full backwards, whose B carries the time of both.

    A schedule without split backwards gives B and W half of a full one each.
    """
    took: defaultdict[str, list[float]] = defaultdict(list)
    for recording in recordings:
        for at, start, end, note in recording.work:
            whole = {B: "BW", W: "within"}.get(at.op.kind, "") if note else at.op.kind.value
            took[whole].append(end - start)
    medians = {kind: median(times) for kind, times in took.items()}
    half = medians.get("BW", 0.0) / 2
    return Costs(medians.get("F", 0.0), medians.get("B", half), medians.get("W", half), medians.get("BW"))


def _zero(step: Mapping[int, StepTimes]) -> float:
    return min(stretch.start for times in step.values() for _, stretch in times.ops)


def _waits(schedule: Schedule, op: Op, waits: Mapping[str, Stretch], begin: float) -> list[tuple[Op, Stretch]]:
    """The waits for what an op needs; not those of a message slot that waited itself."""
    needs = [need for need in schedule.needs(op) if need.kind in RECEIVES]
    return [(need, wait) for need in needs if (wait := waits[str(need)]).start >= begin]


def _note(slot: tuple[Op, ...], op: Op) -> str:
    """What is said of the two halves of a full backward: W comes after its B in one slot."""
    other = op._replace(kind=W if op.kind is B else B)
    if op.kind is F or other not in slot or slot.index(op._replace(kind=B)) > slot.index(op._replace(kind=W)):
        return ""
    return (_WITH if op.kind is B else _WITHIN).format(other)
