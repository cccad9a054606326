"""The schedules of the experiment: the named ones with planted faults, random or chosen to be rare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from dualpipe.schedule import MESSAGES, SENDS, B, F, Kind, Op, Placed, Schedule, W
from dualpipe.schedule.generate import generate
from tests.mutations import MUTATIONS, duplicate, move, replace, split_all, take_out, with_program

SIZES = {
    "dualpipe": ((2, 4), (4, 8), (6, 12)),
    "dualpipev": ((2, 4), (4, 8), (6, 12)),
    "1f1b": ((2, 4), (4, 6), (6, 8)),
    "zb1p": ((2, 4), (4, 6), (6, 8)),
}
"""The sizes (ranks, microbatches) of each named schedule."""


@dataclass(frozen=True)
class Mutant:
    """A schedule of the experiment: the named schedule that it comes from, and its planted faults."""

    number: int
    origin: str
    faults: tuple[str, ...]
    schedule: Schedule

    def __str__(self) -> str:
        return f"mutant {self.number}: {self.origin}, {', '.join(self.faults)}"


Mutation = Callable[[Schedule, Random], Schedule | None]


def exchange(kind: Kind) -> Mutation:
    """Exchange two ops of one kind, stage and lane; half of the time two of consecutive microbatches."""

    def mutate(schedule: Schedule, random: Random) -> Schedule | None:
        one = random.choice([placed for placed in schedule if placed.op.kind is kind])
        row = [other for other in schedule if _row(other) == _row(one) and other.op.mb != one.op.mb]
        if random.random() < 0.5:
            row = [other for other in row if abs(other.op.mb - one.op.mb) == 1]
        if not row:
            return None
        other = random.choice(row)
        return _put(_put(schedule, one, other.op), other, one.op)

    return mutate


def exchange_microbatches(schedule: Schedule, random: Random) -> Schedule | None:
    """Exchange the numbers of two microbatches of a lane on every rank."""
    lane = random.choice(schedule.lanes)
    one = random.randrange(schedule.microbatches[lane])
    other = random.choice([mb for mb in range(schedule.microbatches[lane]) if mb != one] or [one])
    names = {one: other, other: one}
    for rank, program in enumerate(schedule.programs):
        slots = [tuple(op._replace(mb=names.get(op.mb, op.mb)) if op.lane is lane else op for op in s) for s in program]
        schedule = with_program(schedule, rank, slots)
    return schedule


def repeat_both_sides(schedule: Schedule, random: Random) -> Schedule | None:
    """Send a message twice in a row and receive it twice in a row."""
    sends = [placed for placed in schedule if placed.op.kind in SENDS]
    if not sends:
        return None
    send = random.choice(sends)
    receive = next(placed for placed in schedule if send.op.bare in schedule.needs(placed.op) and _receives(placed))
    for placed in (send, receive):
        schedule = duplicate(schedule, placed.rank, placed.slot, placed.position)
    return schedule


def gently(whole_slot: bool) -> Mutation:
    """Move an op or a slot to where its rank still has all that it needs and each message still has its partner."""

    def mutate(schedule: Schedule, random: Random) -> Schedule | None:
        for _ in range(_TRIES):
            rank = random.randrange(schedule.ranks)
            slot = random.randrange(len(schedule.programs[rank]))
            to = random.randrange(len(schedule.programs[rank]))
            position = random.randrange(len(schedule.programs[rank][slot]))
            moved = move(schedule, rank, slot, to) if whole_slot else take_out(schedule, rank, slot, position, to)
            if (
                moved.programs != schedule.programs
                and _has_needs(moved, rank)
                and _row_of(moved, rank) == _row_of(schedule, rank)
            ):
                return moved
        return None

    return mutate


def one_by_one(schedule: Schedule, random: Random) -> Schedule | None:
    """On some ranks, issue messages one by one: by kind in a random order, unchanged within a kind."""
    kinds = random.sample(sorted(MESSAGES), len(MESSAGES))
    apart = split_all(schedule, lambda op: kinds.index(op.kind))
    for rank in random.sample(range(schedule.ranks), random.randint(1, schedule.ranks)):
        if _row_of(apart, rank) == _row_of(schedule, rank):
            schedule = with_program(schedule, rank, apart.programs[rank])
    return schedule


def backwards_out_of_turn(schedule: Schedule, random: Random) -> Schedule | None:
    """Exchange two consecutive B of a stage, and move only what this requires.

    ::

        RB4 B4 SB4 W3 RB5 B5 SB5 W4 W5   ->   RB4 RB5 B5 W3 B4 SB4 SB5 W4 W5
    """
    backwards = [placed for placed in schedule if placed.op.kind is B]
    for one in random.sample(backwards, len(backwards)):
        other = next((o for o in backwards if _row(o) == _row(one) and o.op.mb == one.op.mb + 1), None)
        if other is None or other.slot <= one.slot:
            continue
        program = list(schedule.programs[one.rank])
        late = [op for slot in program for op in slot if op.bare == Op(Kind.SB, *one.op[1:4])]
        early = [op for slot in program for op in slot if op.bare == Op(Kind.RB, *other.op[1:4])]
        kept = [tuple(op for op in slot if op not in (*late, *early)) for slot in program]
        kept[one.slot] = tuple(other.op if op == one.op else op for op in kept[one.slot])
        kept[other.slot] = tuple(one.op if op == other.op else op for op in kept[other.slot])
        kept[other.slot + 1 : other.slot + 1] = [tuple(late)]
        kept[one.slot : one.slot] = [tuple(early)]
        changed = with_program(schedule, one.rank, kept)
        if _has_needs(changed, one.rank) and _row_of(changed, one.rank) == _row_of(schedule, one.rank):
            return changed
    return None


RARE: dict[str, Mutation] = {
    "move a slot gently": gently(whole_slot=True),
    "move an op gently": gently(whole_slot=False),
    "messages one by one": one_by_one,
    "exchange two F": exchange(F),
    "exchange two B": exchange(B),
    "backwards out of turn": backwards_out_of_turn,
    "exchange two W": exchange(W),
    "exchange two microbatches": exchange_microbatches,
    "repeat a message on both sides": repeat_both_sides,
}
"""Faults that mostly leave each rank what it needs and each message its partner, unlike most random faults."""
_TRIES = 40


def mutants(count: int, seed: int) -> list[Mutant]:
    """``count`` schedules, all different from each other and from the named ones, over all sizes in turn.

    Half of them have one random fault, half have one to three of ``RARE``.
    """
    random = Random(seed)
    found: list[Mutant] = []
    seen = {schedule.programs for _, schedule in named()}
    while len(found) < count:
        for origin, schedule in named():
            if random.random() < 0.5:
                faults = [random.choice(sorted(MUTATIONS))]
            else:
                faults = random.choices(sorted(RARE), k=random.randint(1, 3))
            for fault in faults:
                changed = {**MUTATIONS, **RARE}[fault](schedule, random)
                schedule = schedule if changed is None else changed
            if schedule.programs not in seen and len(found) < count:
                seen.add(schedule.programs)
                found.append(Mutant(len(found), origin, tuple(faults), schedule))
    return found


def named() -> Iterator[tuple[str, Schedule]]:
    """Every named schedule at every size of the experiment."""
    for name, sizes in SIZES.items():
        for ranks, microbatches in sizes:
            yield f"{name} P={ranks} M={microbatches}", generate(name, ranks, microbatches)


def _row(placed: Placed) -> tuple[int, Kind, object, int]:
    return placed.rank, placed.op.kind, placed.op.lane, placed.op.stage


def _put(schedule: Schedule, at: Placed, op: Op) -> Schedule:
    return replace(schedule, at.rank, at.slot, at.position, op)


def _receives(placed: Placed) -> bool:
    return placed.op.kind in (Kind.RF, Kind.RB)


def _has_needs(schedule: Schedule, rank: int) -> bool:
    """Whether each op of a rank except its receives is after what it needs on that rank."""
    done: set[Op] = set()
    for op in (op for slot in schedule.programs[rank] for op in slot):
        if op.kind not in (Kind.RF, Kind.RB) and not done.issuperset(schedule.needs(op)):
            return False
        done.add(op.bare)
    return True


def _row_of(schedule: Schedule, rank: int) -> dict[tuple[bool, int | None], list[Op]]:
    """The messages of a rank to and from every other rank, in order."""
    rows: dict[tuple[bool, int | None], list[Op]] = {}
    for op in (op for slot in schedule.programs[rank] for op in slot):
        if op.kind in MESSAGES:
            rows.setdefault((op.kind in SENDS, schedule.peer(op)), []).append(op)
    return rows
