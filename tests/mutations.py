"""Faults to plant in a schedule: pure functions from a schedule to another, and a seeded choice among them.

A *place* is (rank, slot).  Every function gives a schedule value again, so a slot that would mix computes and messages
is not made: ``merge`` needs two neighbours of a kind, and an op that leaves its slot becomes a slot of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random

from hypothesis import strategies

from dualpipe.schedule import COMPUTE, MESSAGES, SENDS, B, F, Kind, Op, Program, Schedule, Slot, W


@dataclass(frozen=True)
class Mutant:
    """A schedule with a fault planted, and what was done to it."""

    name: str
    schedule: Schedule


def with_program(schedule: Schedule, rank: int, program: Iterable[Slot]) -> Schedule:
    """The schedule with one rank's program replaced; slots that became empty are left out."""
    kept: Program = tuple(slot for slot in program if slot)
    programs = (*schedule.programs[:rank], kept, *schedule.programs[rank + 1 :])
    return Schedule(schedule.routes, programs, schedule.name)


def with_slot(schedule: Schedule, rank: int, slot: int, *instead: Slot) -> Schedule:
    """The schedule with one slot replaced by any number of slots."""
    program = schedule.programs[rank]
    return with_program(schedule, rank, (*program[:slot], *instead, *program[slot + 1 :]))


def swap(schedule: Schedule, rank: int, slot: int) -> Schedule:
    """A slot and the next one change places."""
    program = schedule.programs[rank]
    return with_program(schedule, rank, (*program[:slot], program[slot + 1], program[slot], *program[slot + 2 :]))


def reorder(schedule: Schedule, rank: int, slot: int, *positions: int) -> Schedule:
    """The ops of a slot in another order."""
    ops = schedule.programs[rank][slot]
    return with_slot(schedule, rank, slot, tuple(ops[position] for position in positions))


def drop(schedule: Schedule, rank: int, slot: int, position: int) -> Schedule:
    """An op is left out."""
    ops = schedule.programs[rank][slot]
    return with_slot(schedule, rank, slot, ops[:position] + ops[position + 1 :])


def insert(schedule: Schedule, rank: int, slot: int, *added: Slot) -> Schedule:
    """Slots more, in front of a slot."""
    program = schedule.programs[rank]
    return with_program(schedule, rank, (*program[:slot], *added, *program[slot:]))


def duplicate(schedule: Schedule, rank: int, slot: int, position: int) -> Schedule:
    """An op is done twice in a row, in its own slot."""
    ops = schedule.programs[rank][slot]
    return with_slot(schedule, rank, slot, (*ops[: position + 1], *ops[position:]))


def replace(schedule: Schedule, rank: int, slot: int, position: int, op: Op) -> Schedule:
    """Another op in the place of an op."""
    ops = schedule.programs[rank][slot]
    return with_slot(schedule, rank, slot, (*ops[:position], op, *ops[position + 1 :]))


def redirect(schedule: Schedule, rank: int, slot: int, position: int, peer: int) -> Schedule:
    """A message goes to, or is expected from, this rank."""
    return replace(schedule, rank, slot, position, schedule.programs[rank][slot][position]._replace(peer=peer))


def move(schedule: Schedule, rank: int, slot: int, to: int) -> Schedule:
    """A slot moves to where the slot ``to`` was."""
    program = list(schedule.programs[rank])
    program.insert(to, program.pop(slot))
    return with_program(schedule, rank, program)


def take_out(schedule: Schedule, rank: int, slot: int, position: int, to: int) -> Schedule:
    """An op leaves its slot and becomes a slot of its own in front of the slot ``to``."""
    op = schedule.programs[rank][slot][position]
    program = list(drop_in_place(schedule.programs[rank], slot, position))
    program.insert(to, (op,))
    return with_program(schedule, rank, program)


def drop_in_place(program: Program, slot: int, position: int) -> Program:
    """The program without an op; a slot that it leaves empty keeps its number."""
    ops = program[slot]
    return (*program[:slot], ops[:position] + ops[position + 1 :], *program[slot + 1 :])


def split(schedule: Schedule, rank: int, slot: int) -> Schedule:
    """Every op of a slot gets a slot of its own."""
    return with_slot(schedule, rank, slot, *((op,) for op in schedule.programs[rank][slot]))


def merge(schedule: Schedule, rank: int, slot: int) -> Schedule:
    """A slot and the next one, both of computes or both of messages, become one."""
    program = schedule.programs[rank]
    return with_program(schedule, rank, (*program[:slot], program[slot] + program[slot + 1], *program[slot + 2 :]))


def split_all(schedule: Schedule, key: Callable[[Op], object]) -> Schedule:
    """Every batch of messages as single ones, one slot after the other, sorted by the key (a stable sort)."""
    programs = tuple(
        tuple(
            part for slot in program for part in (((op,) for op in sorted(slot, key=key)) if _talks(slot) else [slot])
        )
        for program in schedule.programs
    )
    return Schedule(schedule.routes, programs, schedule.name)


def relabelled(schedule: Schedule, ranks: Iterable[int], change: Callable[[Op], Op]) -> Schedule:
    """All ops of some ranks changed."""
    for rank in ranks:
        schedule = with_program(schedule, rank, [tuple(map(change, slot)) for slot in schedule.programs[rank]])
    return schedule


def _talks(slot: Slot) -> bool:
    return slot[0].kind in MESSAGES


# The seeded choice.  Each mutation looks for a place where it can be done and gives None where there is none.

Place = tuple[int, int]


def _places(schedule: Schedule, fits: Callable[[Slot], bool]) -> list[Place]:
    return [
        (rank, number)
        for rank, program in enumerate(schedule.programs)
        for number, slot in enumerate(program)
        if fits(slot)
    ]


def _before_another(schedule: Schedule, alike: bool) -> list[Place]:
    return [
        (rank, number)
        for rank, program in enumerate(schedule.programs)
        for number in range(len(program) - 1)
        if not alike or _talks(program[number]) == _talks(program[number + 1])
    ]


def _pick(random: Random, places: list[Place]) -> Place | None:
    return random.choice(places) if places else None


def _at_some_op(
    change: Callable[[Schedule, int, int, int], Schedule], kinds: frozenset[Kind]
) -> Callable[[Schedule, Random], Schedule | None]:
    def mutate(schedule: Schedule, random: Random) -> Schedule | None:
        ops = [placed for placed in schedule if placed.op.kind in kinds]
        if not ops:
            return None
        placed = random.choice(ops)
        return change(schedule, placed.rank, placed.slot, placed.position)

    return mutate


def _swap(schedule: Schedule, random: Random) -> Schedule | None:
    place = _pick(random, _before_another(schedule, alike=False))
    return None if place is None else swap(schedule, *place)


def _reorder(schedule: Schedule, random: Random) -> Schedule | None:
    place = _pick(random, _places(schedule, lambda slot: len(slot) > 1))
    if place is None:
        return None
    positions = list(range(len(schedule.programs[place[0]][place[1]])))
    random.shuffle(positions)
    return reorder(schedule, *place, *positions)


def _swap_sends(schedule: Schedule, random: Random) -> Schedule | None:
    """Two sends of one batch change places."""
    place = _pick(random, _places(schedule, lambda slot: sum(op.kind in SENDS for op in slot) > 1))
    if place is None:
        return None
    slot = schedule.programs[place[0]][place[1]]
    sends = [position for position, op in enumerate(slot) if op.kind in SENDS]
    one, other = random.sample(sends, 2)
    positions = [other if at == one else one if at == other else at for at in range(len(slot))]
    return reorder(schedule, *place, *positions)


def _split(schedule: Schedule, random: Random) -> Schedule | None:
    place = _pick(random, _places(schedule, lambda slot: len(slot) > 1 and _talks(slot)))
    return None if place is None else split(schedule, *place)


def _merge(schedule: Schedule, random: Random) -> Schedule | None:
    place = _pick(random, _before_another(schedule, alike=True))
    return None if place is None else merge(schedule, *place)


def _move(schedule: Schedule, random: Random) -> Schedule | None:
    place = _pick(random, _places(schedule, lambda slot: True))
    if place is None:
        return None
    return move(schedule, *place, random.randrange(len(schedule.programs[place[0]])))


def _wrong_peer(schedule: Schedule, random: Random) -> Schedule | None:
    change = _at_some_op(lambda *at: redirect(*at, random.randint(0, schedule.ranks)), MESSAGES)
    return change(schedule, random)


def _wrong_microbatch(schedule: Schedule, random: Random) -> Schedule | None:
    ops = list(schedule)
    if not ops:
        return None
    rank, slot, position, op = random.choice(ops)
    return replace(schedule, rank, slot, position, op._replace(mb=max(0, op.mb + random.choice((-1, 1)))))


def _shifted(kind: Kind, early: bool) -> Callable[[Schedule, Random], Schedule | None]:
    def mutate(schedule: Schedule, random: Random) -> Schedule | None:
        def change(whole: Schedule, rank: int, slot: int, position: int) -> Schedule:
            last = len(whole.programs[rank])
            to = random.randint(0, slot) if early else random.randint(slot + 1, last)
            return take_out(whole, rank, slot, position, to)

        return _at_some_op(change, frozenset({kind}))(schedule, random)

    return mutate


MUTATIONS: dict[str, Callable[[Schedule, Random], Schedule | None]] = {
    "swap two slots": _swap,
    "reorder a slot": _reorder,
    "swap two sends of a batch": _swap_sends,
    "drop a compute": _at_some_op(drop, COMPUTE),
    "drop a message": _at_some_op(drop, MESSAGES),
    "duplicate an op": _at_some_op(duplicate, COMPUTE | MESSAGES),
    "move a slot": _move,
    "redirect a message": _wrong_peer,
    "wrong microbatch": _wrong_microbatch,
    "split a batch": _split,
    "merge two slots": _merge,
    "early F": _shifted(F, early=True),
    "late F": _shifted(F, early=False),
    "early B": _shifted(B, early=True),
    "late B": _shifted(B, early=False),
    "early W": _shifted(W, early=True),
    "late W": _shifted(W, early=False),
}


def mutate(schedule: Schedule, random: Random, kinds: Iterable[str] = tuple(MUTATIONS)) -> Mutant:
    """One fault of one of the kinds; a schedule with no place for it comes back as it is."""
    name = random.choice(list(kinds))
    changed = MUTATIONS[name](schedule, random)
    return Mutant(name, schedule if changed is None else changed)


def mutants(schedule: Schedule, count: int, seed: int) -> Iterator[Mutant]:
    """``count`` mutants, every kind in its turn; the seed decides where each fault is planted."""
    random = Random(seed)
    kinds = list(MUTATIONS)
    for number in range(count):
        yield mutate(schedule, random, [kinds[number % len(kinds)]])


@strategies.composite
def mutated(draw: strategies.DrawFn, schedule: Schedule, most: int = 3) -> Mutant:
    """A schedule with one to ``most`` faults planted one after the other."""
    random = draw(strategies.randoms(use_true_random=False))
    names = []
    for _ in range(draw(strategies.integers(1, most))):
        mutant = mutate(schedule, random)
        names.append(mutant.name)
        schedule = mutant.schedule
    return Mutant(", ".join(names), schedule)
