"""Run logs in the trace event format, which https://ui.perfetto.dev and chrome://tracing show.

A run is a process.  Every rank has one track for its computes and as many for messages as are in flight at once.
Arrows go from sends to receives.  Counters show the idle ranks and the live activations of each rank::

    rank 0            | 0F0> | 0F1> |  waits for 0RB0> |      0F3>+0B0>+0W0>       |
                                                         | 0F3> | 0B0> | 0W0>      |
    rank 0 messages          | 0SF0> ---> arrow to 1RF0>

Times are microseconds from 0, possibly fractional; ``otherData`` has the scale.  Source of the format: the
document "Trace Event Format" of the Chromium project.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

from dualpipe.files import write_whole
from dualpipe.schedule import F, Op, Placed, W, show_slot
from dualpipe.timeline.run_log import RunLog, Work, simulated
from dualpipe.timeline.summary import describe_costs, headline
from dualpipe.timeline.timeline import Timeline

Event = dict[str, Any]

MICROSECONDS_PER_UNIT = 1000.0
"""How long one unit of simulated time lasts in a trace."""
TICK = 1.0
"""Microseconds by which a message's slice outlasts the message, so that an arrow can attach to it."""


class Scaled(NamedTuple):
    """A run with the length of its unit of time, and the time at which it starts, both in microseconds."""

    run: RunLog
    scale: float = MICROSECONDS_PER_UNIT
    offset: float = 0.0

    def at(self, time: float) -> float:
        """A time of the run as a time in the trace, rounded to nanoseconds."""
        return round(self.offset + time * self.scale, 3)


def write(trace: dict[str, Any], path: Path) -> None:
    """Write a trace to a file, whole or not at all."""
    write_whole(path, dumps(trace).encode())


def dumps(trace: dict[str, Any]) -> str:
    """A trace as JSON, one event a line."""
    rest = {key: value for key, value in trace.items() if key != "traceEvents"}
    events = ",\n".join(json.dumps(event) for event in trace["traceEvents"])
    return f'{{"traceEvents": [\n{events}\n],\n{json.dumps(rest)[1:]}\n'


def of_timeline(timeline: Timeline) -> dict[str, Any]:
    """The trace of a simulation."""
    name, sizes = headline(timeline.schedule)
    about = {
        "schedule": name,
        "sizes": sizes,
        "costs": describe_costs(timeline.costs),
        "scale": f"one unit of time is {MICROSECONDS_PER_UNIT:g} us",
    }
    return trace([Scaled(simulated(timeline, f"simulated {name}, {sizes}"))], about)


def trace(parts: Sequence[Scaled], about: dict[str, Any]) -> dict[str, Any]:
    """The trace of several runs; those with the same name share a process, one after the other.

    ``about`` becomes ``otherData``.
    """
    names = list(dict.fromkeys(part.run.name for part in parts))
    heads = [head for pid, name in enumerate(names, start=1) for head in _names(pid, name, parts)]
    events: list[Event] = []
    arrows = 0
    for part in parts:
        pid = 1 + names.index(part.run.name)
        events += [*_work(pid, part), *_idle(pid, part), *_messages(pid, part, arrows), *_collectives(pid, part)]
        events += _counters(pid, part)
        arrows += len(part.run.messages)
    events.sort(key=lambda event: float(event["ts"]))  # stable: slices that enclose others or last no time stay first
    return {"traceEvents": [*heads, *events], "displayTimeUnit": "ms", "otherData": about}


def _names(pid: int, name: str, parts: Sequence[Scaled]) -> Iterator[Event]:
    """The names and the order of a process and its tracks."""
    own = [part for part in parts if part.run.name == name]
    yield _head("process_name", pid, 0, {"name": name})
    yield _head("process_sort_index", pid, 0, {"sort_index": pid})
    ranks = own[0].run.schedule.ranks
    tracks = {1 + rank: f"rank {rank}" for rank in range(ranks)}
    for rank in range(ranks):
        lanes = 1 + max((lane for part in own for lane in _packed(part, rank).values()), default=-1)
        for lane in range(lanes):
            tracks[_message_track(ranks, rank, lane)] = f"rank {rank} messages" + (f" {lane + 1}" if lane else "")
        if any(each.at.rank == rank for part in own for each in part.run.collectives):
            tracks[_collective_track(rank)] = f"rank {rank} collectives"
    for order, (tid, label) in enumerate(tracks.items()):
        yield _head("thread_name", pid, tid, {"name": label})
        yield _head("thread_sort_index", pid, tid, {"sort_index": order})


def _head(what: str, pid: int, tid: int, args: dict[str, Any]) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": args}


def _work(pid: int, part: Scaled) -> Iterator[Event]:
    """A slice for each compute op; where a slot has several, also one around them."""
    for (rank, number), works in _slots(part.run):
        slot = tuple(work.at.op for work in works)
        start, end = part.at(works[0].start), part.at(works[-1].end)
        if len(works) > 1:
            arguments = {"rank": rank, "slot": number}
            yield _slice(show_slot(slot), "slot", pid, 1 + rank, start, end, arguments)
        for work in works:
            args = _args(part.run, work.at) | ({"note": work.note} if work.note else {})
            yield _slice(str(work.at.op), work.at.op.kind, pid, 1 + rank, part.at(work.start), part.at(work.end), args)


def _idle(pid: int, part: Scaled) -> Iterator[Event]:
    for rank, start, end, need in part.run.idle:
        name = "bubble" if need is None else f"waits for {need}"
        yield _slice(name, "bubble", pid, 1 + rank, part.at(start), part.at(end), {"rank": rank})


def _messages(pid: int, part: Scaled, first: int) -> Iterator[Event]:
    """Two slices for a message, from the posting of each end until it completed, and an arrow between them."""
    ranks = part.run.schedule.ranks
    lanes = [_packed(part, rank) for rank in range(ranks)]
    for number, message in enumerate(part.run.messages, start=first):
        there = part.at(message.completed)
        ends = {message.send: part.at(message.sent), message.receive: part.at(message.awaited)}
        for at, start in ends.items():
            tid = _message_track(ranks, at.rank, lanes[at.rank][at])
            args = _args(part.run, at) | {"peer": part.run.schedule.peer(at.op)}
            yield _slice(str(at.op), at.op.kind, pid, tid, start, there + TICK, args)
        arrow = {"name": str(message.send.op), "cat": "message", "id": number, "pid": pid}
        send, receive = message.send, message.receive
        yield arrow | {"ph": "s", "tid": _message_track(ranks, send.rank, lanes[send.rank][send]), "ts": ends[send]}
        landing = {"ph": "f", "bp": "e", "ts": round(there + TICK / 2, 3)}
        yield arrow | landing | {"tid": _message_track(ranks, receive.rank, lanes[receive.rank][receive])}


def _collectives(pid: int, part: Scaled) -> Iterator[Event]:
    """A slice for each member's part in a collective, from its posting to its end."""
    for at, posted, began, ended in part.run.collectives:
        args = _args(part.run, at) | {"all members had posted it after": f"{began - posted:g}"}
        yield _slice(str(at.op), at.op.kind, pid, _collective_track(at.rank), part.at(posted), part.at(ended), args)


def _collective_track(rank: int) -> int:
    """The thread id, below those of all other tracks, which are positive."""
    return -1 - rank


def _packed(part: Scaled, rank: int) -> dict[Placed, int]:
    """For each message of a rank a track on which no two overlap; the first that is free."""
    spans = []
    for message in part.run.messages:
        for at, posted in ((message.send, message.sent), (message.receive, message.awaited)):
            if at.rank == rank:
                spans.append((part.at(posted), part.at(message.completed) + TICK, at))
    free: list[int] = []
    taken: list[tuple[float, int]] = []
    lanes: dict[Placed, int] = {}
    for start, end, at in sorted(spans):
        while taken and taken[0][0] <= start:
            heappush(free, heappop(taken)[1])
        lane = heappop(free) if free else len(taken)
        heappush(taken, (end, lane))
        lanes[at] = lane
    return lanes


def _message_track(ranks: int, rank: int, lane: int) -> int:
    """The thread id; those of the ranks' own tracks, 1 + rank, come before all of these."""
    return 1 + rank + ranks * (1 + lane)


def _counters(pid: int, part: Scaled) -> Iterator[Event]:
    """How many ranks compute nothing, and how many microbatches are live on each rank, whenever that changes."""
    live: dict[int, list[tuple[float, int]]] = defaultdict(list)
    idle: list[tuple[float, int]] = [(part.at(0.0), part.run.schedule.ranks)]
    for (rank, _), works in _slots(part.run):
        start, end = part.at(works[0].start), part.at(works[-1].end)
        live[rank] += [(start, +1) for work in works if work.at.op.kind is F]
        live[rank] += [(end, -1) for work in works if work.at.op.kind is W]
        for work in works:
            idle += [(part.at(work.start), -1), (part.at(work.end), +1)]
    for time, level in _levels(idle):
        yield _counter("idle ranks", pid, time, level)
    for rank, changes in sorted(live.items()):
        for time, level in _levels(changes):
            yield _counter(f"live activations of rank {rank}", pid, time, level)


def _levels(changes: Iterable[tuple[float, int]]) -> Iterator[tuple[float, int]]:
    """The level after each moment of change."""
    moments = [(time, sum(step for _, step in steps)) for time, steps in groupby(sorted(changes), lambda c: c[0])]
    return zip((time for time, _ in moments), accumulate(step for _, step in moments), strict=True)


def _counter(name: str, pid: int, time: float, level: int) -> Event:
    return {"ph": "C", "name": name, "pid": pid, "tid": 0, "ts": time, "args": {"value": level}}


def _slots(run: RunLog) -> Iterator[tuple[tuple[int, int], list[Work]]]:
    """The compute ops of each slot, by rank and the slot's number."""
    for place, works in groupby(run.work, lambda work: (work.at.rank, work.at.slot)):
        yield place, list(works)


def _slice(name: str, kind: str, pid: int, tid: int, start: float, end: float, args: dict[str, Any]) -> Event:
    return {
        "ph": "X",
        "name": name,
        "cat": str(kind),
        "pid": pid,
        "tid": tid,
        "ts": start,
        "dur": round(end - start, 3),
        "args": args,
    }


def _args(run: RunLog, at: Placed) -> dict[str, Any]:
    op: Op = at.op
    return {
        "rank": at.rank,
        "slot": at.slot,
        "stage": op.stage,
        "mb": op.mb,
        "lane": str(op.lane),
        "needs": [str(need) for need in run.schedule.needs(op)],
    }
