"""Traces of measured runs, next to the simulation of the same schedule.

Every step is one run log, placed at the time when its first rank started.  Clocks need no alignment: the ranks are
processes of one machine with one clock, and a barrier starts each step on all of them together.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from dualpipe.schedule import COMPUTE, RECEIVES, SENDS, B, F, Op, Placed, Schedule, W, full_backwards
from dualpipe.timeline import perfetto
from dualpipe.timeline.measured_costs import MEASURED
from dualpipe.timeline.perfetto import Scaled
from dualpipe.timeline.run_log import Idle, RunLog, Work, simulated
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.summary import describe_costs, headline
from dualpipe.timeline.timeline import Costs, Message
from reference.case import Case
from reference.report import Report
from reference.trace import Interval, StepTimes
from reference.verify import PROCESSES, Traced

MICROSECONDS = 1e6
"""Microseconds in a second."""

_WITH = "B and W are one call of autograd here: the time includes {}"
_WITHIN = "part of {}: B and W are one call of autograd here, so this takes almost no time of its own"


def trace_of(report: Report[Case, Traced]) -> str | None:
    """The trace of a timed verification as JSON; ``None`` if the processes did not finish."""
    steps = [step.times for c in report.comparisons if c.name == PROCESSES for step in c.traces]
    if not steps:
        return None
    schedule = report.case.schedule
    return perfetto.dumps(trace(schedule, steps, report.case.blocking, report.case.device))


def trace(schedule: Schedule, steps: Sequence[Mapping[int, StepTimes]], blocking: bool, device: str) -> dict[str, Any]:
    """The measured steps and the simulation with their median costs, each as one process of the trace."""
    begin = min(_zero(step) for step in steps)
    found = [measured(schedule, step) for step in steps]
    costs = median_costs(found)
    name, sizes = headline(schedule)
    ideal = simulated(simulate(schedule, costs, blocking=blocking), "simulated with the median costs")
    parts = []
    for step, run in zip(steps, found, strict=True):
        offset = (_zero(step) - begin) * MICROSECONDS
        parts += [Scaled(run, MICROSECONDS, offset), Scaled(ideal, MICROSECONDS, offset)]
    about = {
        "schedule": name,
        "sizes": sizes,
        "scale": "microseconds of time.monotonic since the first op of the first step",
        "costs": f"{describe_costs(costs)} (seconds, the median of each kind)",
        "device": device if device == "cpu" else f"{device}: an op's time is that of launching its work",
    }
    return perfetto.trace(parts, about)


def measured(schedule: Schedule, step: Mapping[int, StepTimes]) -> RunLog:
    """One step as a run log, in seconds since its first op.  A wait precedes the op that needed it."""
    zero = _zero(step)
    work: list[Work] = []
    idle: list[Idle] = []
    sends: defaultdict[tuple[int, int], deque[tuple[Placed, float]]] = defaultdict(deque)
    receives: list[tuple[Placed, int, float, float]] = []
    for rank, program in enumerate(schedule.programs):
        times = step[rank]
        placed = [Placed(rank, number, at, op) for number, slot in enumerate(program) for at, op in enumerate(slot)]
        for at, (op, (start, end)) in zip(placed, times.ops, strict=True):
            if at.op != op:
                raise AssertionError(f"rank {rank} measured {op} where the schedule has {at.op}")
            if op.kind in COMPUTE:
                waits = _waits(schedule, op, times.waits, start)
                idle += [Idle(rank, wait.start - zero, wait.end - zero, need) for need, wait in waits]
                start = max([start, *(wait.end for _, wait in waits)])
                work.append(Work(at, start - zero, end - zero, _note(program[at.slot], op)))
                continue
            peer = schedule.peer(op)
            assert peer is not None, "a message that completed has a peer"
            if op.kind in SENDS:
                sends[rank, peer].append((at, start - zero))
            else:
                receives.append((at, peer, start - zero, times.waits[str(op.bare)].end - zero))
    messages = []
    for at, peer, awaited, completed in receives:
        send, sent = sends[peer, at.rank].popleft()
        messages.append(Message(send, at, sent, awaited, completed))
    return RunLog(MEASURED, schedule, tuple(work), tuple(idle), tuple(messages))


def median_costs(runs: Sequence[RunLog]) -> Costs:
    """The median time of each kind: F, split B and W, and full backwards, whose B has the time of both.

    If no backward is split, B and W get half of a full backward each.
    """
    took: defaultdict[str, list[float]] = defaultdict(list)
    for run in runs:
        for at, start, end, note in run.work:
            whole = {B: "BW", W: "within"}.get(at.op.kind, "") if note else at.op.kind.value
            took[whole].append(end - start)
    medians = {kind: median(times) for kind, times in took.items()}
    half = medians.get("BW", 0.0) / 2
    return Costs(medians.get("F", 0.0), medians.get("B", half), medians.get("W", half), medians.get("BW"))


def _zero(step: Mapping[int, StepTimes]) -> float:
    return min(interval.start for times in step.values() for _, interval in times.ops)


def _waits(schedule: Schedule, op: Op, waits: Mapping[str, Interval], begin: float) -> list[tuple[Op, Interval]]:
    """The waits for the messages that an op needs, except those of a message slot, which waited itself."""
    needs = [need for need in schedule.needs(op) if need.kind in RECEIVES]
    return [(need, wait) for need in needs if (wait := waits[str(need)]).start >= begin]


def _note(slot: tuple[Op, ...], op: Op) -> str:
    """The note on each half of a full backward."""
    if op.kind is F or op.task not in full_backwards(slot):
        return ""
    return _WITH.format(op._replace(kind=W)) if op.kind is B else _WITHIN.format(op._replace(kind=B))
