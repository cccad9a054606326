"""Deadlock by plain search: the ranks run as far as they can under a model of communication (``proofs.models``).

Which rank moves first makes no difference, since a move never takes away another rank's: the run either ends or
stops in one state, in linear time.  In that state every rank that is not done stands in a group some message of
which has not met its partner; following the partners leads either to one that does not exist or round a circle.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from dualpipe.schedule import COMPUTE, SENDS, Placed, Schedule, Slot
from proofs.findings import Circle, NeverMet, Wait
from proofs.matching import Sides, other_rank, sides
from proofs.models import Model
from proofs.verdict import Proved, Refuted, Verdict

Pair = tuple[int, int]


@dataclass(frozen=True)
class Thread:
    """One rank's program cut into its computes and its groups.

    ``groups[g]`` is a slot number; it is posted once ``after[g]`` computes are over.  Compute c starts once
    ``gates[c]`` groups are over.
    """

    groups: list[int]
    after: list[int]
    gates: list[int]


@dataclass
class State:
    """How far a rank is: computes over, groups over, and what its posted group still waits for.

    ``pending`` is ``None`` between groups; in it each message has its number within its ordered pair (None where it
    has no other rank to go to).
    """

    computes: int = 0
    groups: int = 0
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
            before = state.computes, state.groups, state.pending is None
            while state.computes < len(own.gates) and own.gates[state.computes] <= state.groups:
                state.computes += 1
            if state.pending is None and state.groups < len(own.groups) and own.after[state.groups] <= state.computes:
                state.pending = self.post(rank, own.groups[state.groups], woken)
            if state.pending is not None:
                state.pending = [(placed, nth) for placed, nth in state.pending if not self.met(placed, nth)]
                if not state.pending:
                    state.pending, state.groups = None, state.groups + 1
            if before == (state.computes, state.groups, state.pending is None):
                return woken

    def post(self, rank: int, number: int, woken: set[int]) -> list[tuple[Placed, int | None]]:
        numbered: list[tuple[Placed, int | None]] = []
        for position, op in enumerate(self.schedule.programs[rank][number]):
            placed = Placed(rank, number, position, op)
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

    def met(self, placed: Placed, nth: int | None) -> bool:
        peer = other_rank(self.schedule, placed)
        if nth is None or peer is None:  # joins no pair of ranks, so where sends are buffered its place is its own
            return placed.op.kind in SENDS and self.model.capacity > 0
        if placed.op.kind in SENDS:
            return self.received.get((placed.rank, peer), 0) > nth - self.model.capacity
        return self.sent.get((peer, placed.rank), 0) > nth


def deadlock(schedule: Schedule, model: Model) -> Verdict:
    """Every rank reaches its end and every message is received, whatever the compute times are."""
    run = Run(schedule, model)
    stuck = [waiting for state in run.states for waiting in state.pending or ()]
    buffered = [pair for pair, count in run.sent.items() if run.received.get(pair, 0) < count]
    if not stuck and not buffered and not run.astray:
        return Proved()
    both = sides(schedule)
    waits: dict[int, list[Wait]] = {}
    for placed, nth in stuck:
        partner = _partner(schedule, model, both, placed, nth)
        if partner is None:
            posted = len(_opposite(schedule, both, placed))
            return Refuted(NeverMet(model, placed, schedule.peer(placed.op), nth or 0, posted, nth is not None))
        waits.setdefault(placed.rank, []).append(Wait(placed, partner))
    if waits:
        return Refuted(Circle(model, shortest_circle(waits)))
    if run.astray:
        placed = run.astray[0]
        return Refuted(NeverMet(model, placed, schedule.peer(placed.op), 0, 0, False))
    sender, receiver = buffered[0]  # the sends fitted into the buffer, and nobody empties it
    posted = run.received.get((sender, receiver), 0)
    return Refuted(NeverMet(model, both[0][sender, receiver][posted], receiver, posted, posted, True))


def thread(schedule: Schedule, rank: int, model: Model) -> Thread:
    """Cut a rank's program; where the model overlaps, a compute's gate is the last group that it needs."""
    groups: list[int] = []
    after: list[int] = []
    gates: list[int] = []
    brought: dict[object, int] = {}
    for number, slot in enumerate(schedule.programs[rank]):
        if slot[0].kind in COMPUTE:
            gates.append(_last_needed(schedule, slot, brought) if model.overlaps else len(groups))
        else:
            groups.append(number)
            after.append(len(gates))
            if model.overlaps:
                for op in slot:
                    brought.setdefault(op.bare, len(groups))
    return Thread(groups, after, gates)


def _last_needed(schedule: Schedule, slot: Slot, brought: dict[object, int]) -> int:
    return max((brought.get(need, 0) for op in slot for need in schedule.needs(op)), default=0)


def _opposite(schedule: Schedule, both: Sides, placed: Placed) -> list[Placed]:
    """The messages of the other rank among which the partner of a message is."""
    sends, receives = both
    peer = other_rank(schedule, placed)
    if peer is None:
        return []
    return receives.get((placed.rank, peer), []) if placed.op.kind in SENDS else sends.get((peer, placed.rank), [])


def _partner(schedule: Schedule, model: Model, both: Sides, placed: Placed, nth: int | None) -> Placed | None:
    """The message whose posting a pending one waits for: its own partner, or the one whose place a send takes."""
    opposite = _opposite(schedule, both, placed)
    if nth is not None and placed.op.kind in SENDS:
        nth -= model.capacity
    return opposite[nth] if nth is not None and nth < len(opposite) else None


def shortest_circle(waits: dict[int, list[Wait]]) -> tuple[Wait, ...]:
    """The fewest waits, one per rank, that lead from a rank back to itself (breadth first from every rank)."""
    circles = (_circle_through(rank, waits) for rank in sorted(waits))
    return min((circle for circle in circles if circle), key=len)


def _circle_through(start: int, waits: dict[int, list[Wait]]) -> tuple[Wait, ...]:
    came: dict[int, tuple[Wait, ...]] = {start: ()}
    reached = deque([start])
    while reached:
        rank = reached.popleft()
        for wait in waits.get(rank, []):
            path = (*came[rank], wait)
            if wait.partner.rank == start:
                return path
            if wait.partner.rank not in came:
                came[wait.partner.rank] = path
                reached.append(wait.partner.rank)
    return ()
