"""Deadlock by plain search: the ranks run as far as they can under a model of communication (``proofs.models``).

The order in which ranks move makes no difference, since a move of one rank never prevents a move of another: the run
ends or stops in one state, in linear time.  In that state every rank that is not done is blocked in a slot of messages,
at one whose partner is not posted, or in a slot of collectives, at one that a member of its group has not joined.
Following the partners leads to one that does not exist, or around a wait cycle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from dualpipe.schedule import COLLECTIVES, COMPUTE, MESSAGES, SENDS, Placed, Schedule, Slot
from proofs.findings import NeverJoined, Unmatched, Wait, WaitCycle
from proofs.models import Model
from proofs.verdict import Proved, Refuted, Verdict

Pair = tuple[int, int]
"""Sender and receiver."""

Channels = dict[Pair, list[Placed]]
"""For each ordered pair of ranks one side of its messages, in the order posted."""


@dataclass(frozen=True)
class Thread:
    """One rank's program cut into its computes and its message slots, which include those of collectives.

    ``messages[m]`` is the number of a message slot; it is posted once ``after[m]`` computes are done.  Compute c starts
    once ``gates[c]`` message slots have completed.
    """

    messages: list[int]
    after: list[int]
    gates: list[int]


@dataclass
class State:
    """How far a rank is: computes done, message slots completed, and what the posted message slot still waits for.

    ``pending`` is ``None`` while no message slot is posted.  Each of its messages has its number within its ordered
    pair, or ``None`` where no other rank is at the other end; a collective has its number within its rank and group.
    """

    computes: int = 0
    completed: int = 0
    pending: list[tuple[Placed, int | None]] | None = None


@dataclass
class Run:
    """A run that goes as far as it can."""

    schedule: Schedule
    model: Model
    threads: list[Thread] = field(init=False)
    states: list[State] = field(init=False)
    sent: dict[Pair, int] = field(default_factory=dict)
    received: dict[Pair, int] = field(default_factory=dict)
    joined: dict[Pair, int] = field(default_factory=dict)
    """How many collectives of a group a rank has posted, by rank and group."""
    astray: list[Placed] = field(default_factory=list)
    """Posted sends that no other rank can receive."""

    def __post_init__(self) -> None:
        self.threads = [thread(self.schedule, rank, self.model) for rank in range(self.schedule.ranks)]
        self.states = [State() for _ in self.threads]
        waiting = deque(range(self.schedule.ranks))
        queued = set(waiting)
        while waiting:
            rank = waiting.popleft()
            queued.discard(rank)
            for woken in self.advance(rank) - queued:
                queued.add(woken)
                waiting.append(woken)

    def advance(self, rank: int) -> set[int]:
        """Move one rank as far as it can; the ranks that its messages may have woken."""
        own, state = self.threads[rank], self.states[rank]
        woken: set[int] = set()
        while True:
            before = state.computes, state.completed, state.pending is None
            while state.computes < len(own.gates) and own.gates[state.computes] <= state.completed:
                state.computes += 1
            posted = state.pending is not None
            if not posted and state.completed < len(own.messages) and own.after[state.completed] <= state.computes:
                state.pending = self.post(rank, own.messages[state.completed], woken)
            if state.pending is not None:
                state.pending = [(placed, nth) for placed, nth in state.pending if not self.has_completed(placed, nth)]
                if not state.pending:
                    state.pending, state.completed = None, state.completed + 1
            if before == (state.computes, state.completed, state.pending is None):
                return woken

    def post(self, rank: int, number: int, woken: set[int]) -> list[tuple[Placed, int | None]]:
        numbered: list[tuple[Placed, int | None]] = []
        for position, op in enumerate(self.schedule.programs[rank][number]):
            placed = Placed(rank, number, position, op)
            if op.kind in COLLECTIVES:
                numbered.append((placed, self.join(placed, woken)))
                continue
            peer = other_rank(self.schedule, placed)
            nth = None
            if peer is not None:
                count, pair = (self.sent, (rank, peer)) if op.kind in SENDS else (self.received, (peer, rank))
                nth = count.get(pair, 0)
                count[pair] = nth + 1
                woken.add(peer)
            elif op.kind in SENDS:
                self.astray.append(placed)
            numbered.append((placed, nth))
        return numbered

    def join(self, placed: Placed, woken: set[int]) -> int | None:
        """Post a collective; its number within its rank and group, or ``None`` if it is of no group."""
        group = placed.op.peer
        if group is None:
            return None
        nth = self.joined.get((placed.rank, group), 0)
        self.joined[placed.rank, group] = nth + 1
        woken.update(rank for rank in self.schedule.groups[group] if rank != placed.rank)
        return nth

    def absent(self, placed: Placed, nth: int | None) -> list[int]:
        """The members of its group that have not joined a collective of one of them."""
        members = () if placed.op.peer is None else self.schedule.groups[placed.op.peer]
        if nth is None or placed.rank not in members:
            return []
        return [rank for rank in members if self.joined.get((rank, placed.op.peer or 0), 0) <= nth]

    def has_completed(self, placed: Placed, nth: int | None) -> bool:
        if placed.op.kind in COLLECTIVES:
            return not self.absent(placed, nth)
        peer = other_rank(self.schedule, placed)
        if nth is None or peer is None:  # belongs to no pair, so a buffered send has a buffer to itself
            return placed.op.kind in SENDS and self.model.capacity > 0
        if placed.op.kind in SENDS:
            return self.received.get((placed.rank, peer), 0) > nth - self.model.capacity
        return self.sent.get((peer, placed.rank), 0) > nth


def deadlock(schedule: Schedule, model: Model) -> Verdict:
    """Every rank reaches its end, every message is received and every collective joined, whatever computes take."""
    run = Run(schedule, model)
    stuck = [waiting for state in run.states for waiting in state.pending or ()]
    buffered = [pair for pair, count in run.sent.items() if run.received.get(pair, 0) < count]
    if not stuck and not buffered and not run.astray:
        return Proved()
    sends, receives = channels(schedule)
    waits: dict[int, list[Wait]] = {}
    for placed, nth in stuck:
        if placed.op.kind in COLLECTIVES:
            rows = _joins(schedule, placed)
            for absent in run.absent(placed, nth):
                if nth is None or nth >= len(rows[absent]):
                    return Refuted(NeverJoined(model, placed, absent, nth or 0, len(rows[absent])))
                waits.setdefault(placed.rank, []).append(Wait(placed, rows[absent][nth]))
            continue
        opposite = _opposite(schedule, sends, receives, placed)
        partner = _partner(model, opposite, placed, nth)
        if partner is None:
            return Refuted(
                Unmatched(model, placed, schedule.peer(placed.op), nth or 0, len(opposite), possible=nth is not None)
            )
        waits.setdefault(placed.rank, []).append(Wait(placed, partner))
    if waits:
        return Refuted(WaitCycle(model, shortest_cycle(waits)))
    if run.astray:
        placed = run.astray[0]
        return Refuted(Unmatched(model, placed, schedule.peer(placed.op), 0, 0, possible=False))
    sender, receiver = buffered[0]  # the buffer had room for the sends, and nothing empties it
    posted = run.received.get((sender, receiver), 0)
    return Refuted(Unmatched(model, sends[sender, receiver][posted], receiver, posted, posted, possible=True))


def thread(schedule: Schedule, rank: int, model: Model) -> Thread:
    """Cut a rank's program; where the model overlaps, a compute's gate is the last message slot that it needs."""
    messages: list[int] = []
    after: list[int] = []
    gates: list[int] = []
    brought: dict[object, int] = {}
    for number, slot in enumerate(schedule.programs[rank]):
        if slot[0].kind in COMPUTE:
            gates.append(_last_needed(schedule, slot, brought) if model.overlaps else len(messages))
        else:
            messages.append(number)
            after.append(len(gates))
            if model.overlaps:
                for op in slot:
                    brought.setdefault(op.bare, len(messages))
    return Thread(messages, after, gates)


def _last_needed(schedule: Schedule, slot: Slot, brought: dict[object, int]) -> int:
    return max((brought.get(need, 0) for op in slot for need in schedule.needs(op)), default=0)


def other_rank(schedule: Schedule, placed: Placed) -> int | None:
    """The rank at the other end of a message if there is one: a rank of the schedule, and not the op's own."""
    peer = schedule.peer(placed.op)
    return peer if peer is not None and 0 <= peer < schedule.ranks and peer != placed.rank else None


def channels(schedule: Schedule) -> tuple[Channels, Channels]:
    """The sends and the receives of each ordered pair.

    They name the partners in a finding.  No verdict rests on them: ``Run`` counts messages, ``proofs.deadlock_smt``
    matches by itself.
    """
    sends: Channels = {}
    receives: Channels = {}
    for placed in schedule:
        if placed.op.kind not in MESSAGES:
            continue
        peer = other_rank(schedule, placed)
        if peer is not None and placed.op.kind in SENDS:
            sends.setdefault((placed.rank, peer), []).append(placed)
        elif peer is not None:
            receives.setdefault((peer, placed.rank), []).append(placed)
    return sends, receives


def matched_pairs(schedule: Schedule) -> Iterator[tuple[Placed, Placed]]:
    """Every send with the receive that it matches, and every collective of a group's first member with the others'."""
    sends, receives = channels(schedule)
    for pair, row in sends.items():
        yield from zip(row, receives.get(pair, []), strict=False)
    for number in range(len(schedule.groups)):
        first, *others = _of_group(schedule, number).values()
        for other in others:
            yield from zip(first, other, strict=False)


def _joins(schedule: Schedule, placed: Placed) -> dict[int, list[Placed]]:
    """For each member of the group of a collective its collectives of that group."""
    return {} if placed.op.peer is None else _of_group(schedule, placed.op.peer)


def _of_group(schedule: Schedule, number: int) -> dict[int, list[Placed]]:
    rows: dict[int, list[Placed]] = {rank: [] for rank in schedule.groups[number]}
    for placed in schedule:
        if placed.op.kind in COLLECTIVES and placed.op.peer == number and placed.rank in rows:
            rows[placed.rank].append(placed)
    return rows


def _opposite(schedule: Schedule, sends: Channels, receives: Channels, placed: Placed) -> list[Placed]:
    """The messages of the other rank among which the partner of a message is."""
    peer = other_rank(schedule, placed)
    if peer is None:
        return []
    return receives.get((placed.rank, peer), []) if placed.op.kind in SENDS else sends.get((peer, placed.rank), [])


def _partner(model: Model, opposite: list[Placed], placed: Placed, nth: int | None) -> Placed | None:
    """The message whose posting a pending one waits for: the one that matches it, or that makes room in the buffer."""
    if nth is not None and placed.op.kind in SENDS:
        nth -= model.capacity
    return opposite[nth] if nth is not None and nth < len(opposite) else None


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
