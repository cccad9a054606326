"""Deadlock by plain search: the ranks run as far as they can under a model of communication (``proofs.models``).

The order in which ranks move makes no difference, since a move of one rank never prevents a move of another: the run
ends or stops in one state, in linear time.  In that state every rank that is not done waits for something that another
rank has not posted (``proofs.threads``).  Following these waits leads to something that no rank posts, or around a wait
cycle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from dualpipe.schedule import Placed, Schedule
from proofs.findings import Unmatched, Wait, WaitCycle
from proofs.models import Model
from proofs.table import table_of
from proofs.threads import AT_END, BUFFER, NEVER, Counters, posts, thread, threads_of
from proofs.verdict import Proved, Refuted, Verdict


class Stuck(NamedTuple):
    """A wait that never ends: ``op`` is the number of the op that waits for a counter to reach ``until``."""

    rank: int
    op: int
    counter: int
    until: int


class Run:
    """A run that goes as far as it can."""

    def __init__(self, schedule: Schedule, model: Model) -> None:
        self.model = model
        self.counters, self.threads = threads_of(table_of(schedule), by_use=model.edges)
        self.start = self.counters.start(model)
        self.posted = list(self.start)
        self.steps = [0] * schedule.ranks
        """How many steps of a rank are posted."""
        self.waits = [0] * schedule.ranks
        """How many waits of a rank have ended."""
        self.used: list[int] = []
        """The counters in the order in which they were first increased."""
        waiting = deque(range(schedule.ranks))
        queued = set(waiting)
        while waiting:
            rank = waiting.popleft()
            queued.discard(rank)
            for woken in self.advance(rank) - queued:
                queued.add(woken)
                waiting.append(woken)

    def advance(self, rank: int) -> set[int]:
        """Move one rank as far as it can go; returns the ranks that may go on after that."""
        own, posted, wakes = self.threads[rank], self.posted, self.counters.wakes
        posts, post_ends, wait_ends = own.posts, own.post_ends, own.wait_ends
        waits, until, start = own.waits, own.until, self.start
        step, ended = self.steps[rank], self.waits[rank]
        woken: set[int] = set()
        last = len(post_ends)
        while True:
            end = wait_ends[step - 1] if step else 0
            while ended < end and posted[waits[ended]] >= until[ended]:
                ended += 1
            if ended < end or step == last:
                break
            for counter in posts[post_ends[step - 1] if step else 0 : post_ends[step]]:
                if posted[counter] == start[counter]:
                    self.used.append(counter)
                posted[counter] += 1
                woken.update(wakes[counter])
            step += 1
        self.steps[rank], self.waits[rank] = step, ended
        return woken

    def received(self, send: int) -> int:
        """How many receives are posted by the pair of ranks whose sends have this counter."""
        return self.posted[send + 1] - self.start[send + 1]

    def stuck(self) -> Iterator[Stuck]:
        """The waits that have not ended, rank by rank."""
        for rank, own in enumerate(self.threads):
            step = self.steps[rank]
            end = own.wait_ends[step - 1] if step else 0
            if self.waits[rank] < end:
                ops = thread(self.counters, rank, by_use=self.model.edges, with_ops=True).ops or []
                for at in range(self.waits[rank], end):
                    counter, until = own.waits[at], own.until[at]
                    if self.posted[counter] < until:
                        yield Stuck(rank, ops[at], counter, until)


def deadlock(schedule: Schedule, model: Model) -> Verdict:
    """Decide whether all ranks reach their ends and all messages and collectives complete, for any compute times."""
    run = Run(schedule, model)
    sends = set(run.counters.pairs.values())
    buffered = [send for send in run.used if send in sends and run.received(send) < run.posted[send]]
    astray = [run.counters.astray[at] for at in run.used if at in run.counters.astray]
    stuck = list(run.stuck())
    if not stuck and not buffered and not astray:
        return Proved()
    finder = Finder(run.counters, model)
    waits: dict[int, list[Wait]] = {}
    lost: dict[int, Unmatched] = {}
    for each in stuck:
        found = finder.reason(each)
        if isinstance(found, Unmatched):
            lost.setdefault(each.rank, found)
        elif found is not None:
            waits.setdefault(each.rank, []).append(found)
    if lost:
        return Refuted(cause(lost, waits))
    if waits:
        return Refuted(WaitCycle(model, shortest_cycle(waits)))
    if astray:
        return Refuted(finder.nowhere(*astray[0]))
    send = buffered[0]  # the buffer had room for the sends, and nothing empties it
    return Refuted(finder.unmatched(send, run.received(send)))


class Finder:
    """Finds the ops behind the waits of a run that does not end.  It explains a verdict, and does not decide it."""

    def __init__(self, counters: Counters, model: Model) -> None:
        self.counters, self.table, self.model = counters, counters.table, model
        self.posts = posts(counters)
        self.sends = set(counters.pairs.values())
        self.of_members = {counter: rank for (_, rank), counter in counters.members.items()}

    def reason(self, stuck: Stuck) -> Wait | Unmatched | None:
        """What a rank waits for, or the message that it posted without a partner.

        ``None`` if the rank waits at its end for a partner that another rank has but never reaches.
        """
        rank, op, counter, until = stuck
        if counter in (NEVER, BUFFER):
            lost = [number for other, number in self.posts[NEVER] if other == rank]
            return self.nowhere(rank, op if op in lost else lost[0])
        row = self.posts[counter]
        receives = counter - 1 in self.sends
        nth = until - 1 - (self.model.capacity if receives else 0)
        if nth < len(row):
            return None if op == AT_END else Wait(self.table.placed(rank, op), self.table.placed(*row[nth]))
        if counter in self.of_members:
            place, member = self.table.placed(rank, op), self.of_members[counter]
            return Unmatched(self.model, place, member, until - 1, len(row))
        own = self.counters.other_side(counter)
        return self.unmatched(own, self.posts[own].index((rank, op)) if (rank, op) in self.posts[own] else len(row))

    def unmatched(self, counter: int, nth: int) -> Unmatched:
        """The ``nth`` message of one side of a pair of ranks, if the other side has no partner for it."""
        place = self.table.placed(*self.posts[counter][nth])
        posted = len(self.posts[self.counters.other_side(counter)])
        return Unmatched(self.model, place, self._peer(place), nth, posted)

    def nowhere(self, rank: int, number: int) -> Unmatched:
        """A message that has no other rank at its other end."""
        place = self.table.placed(rank, number)
        return Unmatched(self.model, place, self._peer(place), 0, 0, possible=False)

    def _peer(self, place: Placed) -> int | None:
        return self.table.routes.peer(place.op)


def matched_pairs(schedule: Schedule) -> Iterator[tuple[Placed, Placed]]:
    """Every send with its receive; and every collective of a group's first member with that of each other member."""
    table = table_of(schedule)
    counters = Counters(table)
    rows = posts(counters)
    sides = [(send, send + 1) for send in counters.pairs.values()]
    for group, members in enumerate(schedule.groups):
        first, *others = (counters.joins(group, rank) for rank in members)
        sides += ((first, other) for other in others)
    for one, other in sides:
        for ends in zip(rows.get(one, []), rows.get(other, []), strict=False):
            yield table.placed(*ends[0]), table.placed(*ends[1])


def cause(lost: Mapping[int, Unmatched], waits: Mapping[int, Sequence[Wait]]) -> Unmatched:
    """The message without a partner that explains the others.

    If there is a message whose peer is not blocked, it is the first such message: its partner is missing in any case.
    If there is none, ranks wait for each other in a cycle, for instance two that both send; then it is the first
    message of such a cycle.
    """
    for found in lost.values():
        if not found.possible or (found.peer not in lost and found.peer not in waits):
            return found
    for start, found in lost.items():
        blocked: list[Placed] = []
        rank = found.peer
        while rank is not None and rank != start and rank not in {place.rank for place in blocked}:
            if rank in lost:
                blocked.append(lost[rank].place)
                rank = lost[rank].peer
            else:
                blocked.append(waits[rank][0].place)
                rank = waits[rank][0].partner.rank
        if rank == start:
            return replace(found, circle=tuple(blocked))
    return next(iter(lost.values()))


def shortest_cycle(waits: dict[int, list[Wait]]) -> tuple[Wait, ...]:
    """The fewest waits, one per rank, that lead from a rank back to itself (breadth first from every rank)."""
    cycles = (_cycle_through(rank, waits) for rank in sorted(waits))
    return min((cycle for cycle in cycles if cycle), key=len)


def _cycle_through(start: int, waits: dict[int, list[Wait]]) -> tuple[Wait, ...]:
    paths: dict[int, tuple[Wait, ...]] = {start: ()}
    reached = deque([start])
    while reached:
        rank = reached.popleft()
        for wait in waits.get(rank, []):
            path = (*paths[rank], wait)
            if wait.partner.rank == start:
                return path
            if wait.partner.rank not in paths:
                paths[wait.partner.rank] = path
                reached.append(wait.partner.rank)
    return ()
