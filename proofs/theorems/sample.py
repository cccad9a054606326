"""One size of a family: its computes, and which of them waits for which.

Read off the expanded table, with the row and the iteration of each compute.  The finder of times fits its guesses to
these waits.  No proof rests on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

from dualpipe.schedule import MESSAGES, RECEIVES, SENDS, Op, Schedule
from dualpipe.schedule.generate import Plan
from proofs.theorems.deadlock import Waiting
from proofs.theorems.family import Family
from proofs.theorems.instance import kind_of, plans_at
from proofs.theorems.moment import END
from proofs.theorems.symbolic import computes_of


class Compute(NamedTuple):
    """A compute at one size, or the end of a rank's program.

    ``number`` counts the computes of ``row``'s body, ``name`` is its ops.  ``values`` are those of the symbols of the
    rank's kind.
    """

    kind: str
    row: str
    number: int
    iteration: int
    name: str
    duration: int
    values: tuple[tuple[str, int], ...]

    def on(self, rank: int) -> str:
        return f"{self.name} in row {self.row!r} of rank {rank}, iteration {self.iteration}"


class Wait(NamedTuple):
    """``later`` starts once ``earlier`` has ended; if ``earlier`` is ``None``, it starts at time 0 or later."""

    earlier: Compute | None
    later: Compute


class Cycle(NamedTuple):
    """Ranks with a compute of each, where each waits for the one before it, and the first for the last."""

    places: tuple[tuple[int, Compute], ...]

    def __str__(self) -> str:
        """The wait of the lowest rank for another rank."""
        waits = list(zip(self.places, (self.places[-1], *self.places), strict=False))
        across = [(later, earlier) for later, earlier in waits if later[0] != earlier[0]]
        (rank, compute), (peer, other) = min(across or waits, key=lambda wait: wait[0][0])
        return f"{compute.on(rank)}, waits for {other.on(peer)}"


class Sample(NamedTuple):
    """All waits of a size (those that mirrored ranks share, once) and the ends of the programs.

    ``makespan`` is the end of the step where every compute starts as early as it can and each F, B and W takes one unit
    of time.  It is ``None`` if there is a ``cycle`` of waits: then the schedule deadlocks at this size.
    """

    ranks: int
    microbatches: int
    waits: tuple[Wait, ...]
    ends: tuple[Compute, ...]
    makespan: int | None
    cycle: Cycle | None


Node = tuple[int, int]
"""A rank and the number of a compute in its program."""


def sample(family: Family, ranks: int, microbatches: int, waiting: Waiting = Waiting.BLOCKING) -> Sample:
    """The family at one size.  Raises ``IndexError`` if the table runs a deferred W and none is left."""
    plans = plans_at(family, ranks, microbatches)
    schedule = Schedule(plans[0].routes, tuple(plan.program() for plan in plans), family.name)
    rows = [list(_computes(family, plan)) for plan in plans]
    nodes = {(rank, number): compute for rank, row in enumerate(rows) for number, compute in enumerate(row)}
    own = ((before, after) for before, after in pairwise(nodes) if before[0] == after[0])
    across = _partners(schedule) if waiting is Waiting.BLOCKING else _uses(schedule)
    graph = list(dict.fromkeys(chain(own, across)))
    waits = dict.fromkeys(Wait(None, row[0]) for row in rows)
    waits |= dict.fromkeys(Wait(nodes[earlier], nodes[later]) for earlier, later in graph)
    ends = dict.fromkeys(row[-1] for row in rows)
    end = _earliest({node: compute.duration for node, compute in nodes.items()}, graph)
    makespan = end if isinstance(end, int) else None
    cycle = None if isinstance(end, int) else Cycle(tuple((node[0], nodes[node]) for node in end))
    return Sample(ranks, microbatches, tuple(waits), tuple(ends), makespan, cycle)


def _computes(family: Family, plan: Plan) -> Iterator[Compute]:
    """A rank's computes in the order of its program, then its end."""
    kind = kind_of(family, plan).kind
    values = tuple(family.values(plan.sizes, "").items())
    for row in plan.table:
        steps = [row.steps[step] for step in computes_of(row.steps)]
        for iteration in range(row.times(plan.sizes)):
            for number, step in enumerate(steps):
                yield Compute(kind, row.name, number, iteration, "+".join(map(str, step)), len(step), values)
    yield Compute(kind, END, 0, 0, END, 0, values)


def _partners(schedule: Schedule) -> Iterator[tuple[Node, Node]]:
    """The compute after each side of a message waits for the one before the other side."""
    channels: dict[tuple[int, int], tuple[list[Node], list[Node]]] = {}
    for rank, program in enumerate(schedule.programs):
        following = 0
        for slot in program:
            if slot[0].kind in MESSAGES:
                for op in slot:
                    sends, receives = channels.setdefault(_channel(schedule, rank, op), ([], []))
                    (sends if op.kind in SENDS else receives).append((rank, following))
            else:
                following += 1
    for sends, receives in channels.values():
        for send, receive in zip(sends, receives, strict=False):
            for (rank, following), partner in ((send, receive), (receive, send)):
                if following > 0:
                    yield (rank, following - 1), partner


def _uses(schedule: Schedule) -> Iterator[tuple[Node, Node]]:
    """Each compute waits for the one before the sends of the messages that it needs."""
    sent: dict[Op, Node] = {}
    used: list[tuple[Op, Node]] = []
    for rank, program in enumerate(schedule.programs):
        following = 0
        for slot in program:
            if slot[0].kind in MESSAGES:
                sent |= {op: (rank, following - 1) for op in slot if op.kind in SENDS and following > 0}
                continue
            received = (need for op in slot for need in schedule.needs(op) if need.kind in RECEIVES)
            used += [(send, (rank, following)) for need in received for send in schedule.needs(need)]
            following += 1
    yield from ((sent[send], use) for send, use in used if send in sent)


def _channel(schedule: Schedule, rank: int, op: Op) -> tuple[int, int]:
    peer = schedule.peer(op)
    assert peer is not None  # a table has no message without one
    return (rank, peer) if op.kind in SENDS else (peer, rank)


def _earliest(durations: Mapping[Node, int], waits: Sequence[tuple[Node, Node]]) -> int | list[Node]:
    """The makespan if everything starts as early as it can, or a wait cycle: each node waits for the one before."""
    waits_for: dict[Node, list[Node]] = {node: [] for node in durations}
    following: dict[Node, list[Node]] = {node: [] for node in durations}
    for earlier, later in waits:
        waits_for[later].append(earlier)
        following[earlier].append(later)
    left = {node: len(earlier) for node, earlier in waits_for.items()}
    start = dict.fromkeys(durations, 0)
    ready = [node for node, count in left.items() if not count]
    while ready:
        node = ready.pop()
        del left[node]
        for later in following[node]:
            start[later] = max(start[later], start[node] + durations[node])
            left[later] -= 1
            if not left[later]:
                ready.append(later)
    if not left:
        return max(start.values())
    walk = [next(iter(left))]
    while (before := next(node for node in waits_for[walk[-1]] if node in left)) not in walk:
        walk.append(before)
    return walk[walk.index(before) :][::-1]
