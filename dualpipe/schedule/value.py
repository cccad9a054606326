"""The immutable ``Schedule``: what every rank does, in order.

``Routes.needs`` is the dependency rule, written once.  ``dualpipe.schedule.text`` reads and prints the text form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dualpipe.schedule import normalise
from dualpipe.schedule.failure import Failure, check_failures
from dualpipe.schedule.observed import NOTHING, Observed
from dualpipe.schedule.on_demand import OnDemand
from dualpipe.schedule.op import (
    COLLECTIVES,
    COMPUTE,
    LARGEST,
    MESSAGES,
    WHOLE,
    Kind,
    Lane,
    Op,
    Placed,
    Program,
    ScheduleError,
    Slot,
    show_slot,
)
from dualpipe.schedule.routes import Routes, check_routes


@dataclass(frozen=True, init=False)
class Schedule:
    """What every rank does, in order.  An immutable value.

    The arguments are normalised once, here: integers of any type (numpy's included) become ``int``, kinds and lanes
    given as text become ``Kind`` and ``Lane``, any ordered iterable becomes a tuple, a plain tuple of an op's fields
    becomes an ``Op``, and the routes are copied.  So every schedule holds these types and nothing else.

    Parameters
    ----------
    routes:
        For each lane the rank that holds stage 0, 1, 2, ...  Stage ``s`` has the same layers on both lanes, so two
        lanes mean two replicas of each stage.
    programs:
        For each rank its slots.  The ops of a slot are issued together, slots run in order.  Those of a large named
        schedule are generated on demand, and each is checked then.
    name:
        A label.  It does not change what the schedule means, only how it is printed and whether a published memory
        bound applies.
    groups:
        The members of each group of collectives, by its number: ranks of the schedule, in any order.
    failures:
        How ranks of a recorded program failed, the first one first.  A schedule with failures is never proved, so it is
        not equal to one without them.
    observed:
        What was observed when a program ran the schedule.  It takes no part in comparisons, so a recorded schedule is
        equal to a written one with the same ops.

    Raises
    ------
    ScheduleError
        If a part has another type (a bool or a float as a number, a set or a text as a sequence), the name is not one
        word, a route names a rank without a program, an op a lane or stage that does not exist or a number that is
        negative or above 999999999, a slot is empty or mixes compute, messages and collectives, a group is empty, names
        a rank without a program or one twice, an op names a group that does not exist, or a failure names a rank
        without a program or is not one printable line.
    """

    routes: Routes
    programs: Sequence[Program]
    name: str
    groups: tuple[tuple[int, ...], ...]
    failures: tuple[Failure, ...]
    observed: Observed = field(compare=False, repr=False)

    def __init__(
        self,
        routes: Mapping[Lane, Iterable[int]],
        programs: Iterable[Iterable[Iterable[Op]]],
        name: str = "",
        groups: Iterable[Iterable[int]] = (),
        *,
        failures: Iterable[tuple[int, str]] = (),
        observed: Observed = NOTHING,
    ) -> None:
        object.__setattr__(self, "name", normalise.text(name))
        object.__setattr__(self, "observed", observed)
        object.__setattr__(self, "routes", routes if isinstance(routes, Routes) else Routes(routes))
        on_demand = isinstance(programs, OnDemand)
        object.__setattr__(self, "programs", programs if on_demand else normalise.programs(programs))
        object.__setattr__(self, "groups", normalise.groups(groups))
        object.__setattr__(self, "failures", normalise.failures(failures))
        check_name(self.name)
        check_routes(self.routes, len(self.programs))
        check_groups(self.groups, len(self.programs))
        check_failures(self.failures, len(self.programs))
        for program in () if on_demand else self.programs:
            for slot in program:
                check_slot(slot, self.routes, len(self.groups))

    @property
    def ranks(self) -> int:
        return len(self.programs)

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes in the order in which data is dealt and gradients are summed: ``>`` before ``<``."""
        return tuple(lane for lane in Lane if lane in self.routes)

    @cached_property
    def stages(self) -> int:
        """The depth of the model in stages (that of the longest lane)."""
        return max(map(len, self.routes.values()))

    @cached_property
    def microbatches(self) -> Mapping[Lane, int]:
        """For each lane how many microbatches its ops name: one more than the largest number."""
        if isinstance(self.programs, OnDemand):
            return self.programs.microbatches
        count = dict.fromkeys(self.routes, 0)
        for program in self.programs:
            for slot in program:
                for _, lane, _, mb, _ in slot:
                    if mb >= count[lane]:
                        count[lane] = mb + 1
        return count

    def __iter__(self) -> Iterator[Placed]:
        """Every op of every rank with its place, rank by rank in program order."""
        for rank, program in enumerate(self.programs):
            for number, slot in enumerate(program):
                for position, op in enumerate(slot):
                    yield Placed(rank, number, position, op)

    def only(self, kinds: frozenset[Kind]) -> Schedule:
        """The schedule with only the ops of these kinds, such as F, SF and RF for an evaluation."""
        programs = tuple(
            tuple(kept for slot in program if (kept := tuple(op for op in slot if op.kind in kinds)))
            for program in self.programs
        )
        return Schedule(self.routes, programs, self.name, self.groups, failures=self.failures)

    def rank_of(self, op: Op) -> int:
        """The rank that holds the op's stage."""
        return self.routes.rank_of(op)

    def is_first(self, op: Op) -> bool:
        """Whether the op's stage is the one that reads the data."""
        return self.routes.is_first(op)

    def is_last(self, op: Op) -> bool:
        """Whether the op's stage is the one that computes the loss."""
        return self.routes.is_last(op)

    def neighbour(self, op: Op) -> int | None:
        """The rank that a message's partner stage is on, or ``None`` beyond the end of the lane."""
        return self.routes.neighbour(op)

    def peer(self, op: Op) -> int | None:
        """The rank at the other end of a message: the one the file names, else the lane's neighbour."""
        return self.routes.peer(op)

    def crosses(self, op: Op) -> bool:
        """Whether a message op joins two ranks: not beyond a lane's end, nor where neighbours share a rank."""
        return self.routes.crosses(op)

    def needs(self, op: Op) -> tuple[Op, ...]:
        """The ops that must have completed before ``op`` can (see ``Routes.needs``)."""
        return self.routes.needs(op)


def check_name(name: str) -> None:
    """Raise ``ScheduleError`` unless the name is empty or one printable word, without ``#``, as the text form needs."""
    if name and (not name.isprintable() or " " in name or "#" in name):
        raise ScheduleError(
            "a schedule's name is one printable word without #", f"it is {name!r}", "replace other characters by dashes"
        )


def check_groups(groups: tuple[tuple[int, ...], ...], ranks: int) -> None:
    """Raise ``ScheduleError`` unless every group has members, each a rank that has a program, and each once."""
    for number, members in enumerate(groups):
        check_group(number, members, ranks)


def check_group(number: int, members: tuple[int, ...], ranks: int) -> None:
    """``check_groups`` for one group."""
    wrong = next((rank for rank in members if not 0 <= rank < ranks), None)
    if wrong is not None:
        got = f"group {number} has rank {wrong}, and there are {ranks} ranks, counted from 0"
        raise ScheduleError("a group's members are ranks that have programs", got, "add the rank or leave it out")
    if not members or len(set(members)) < len(members):
        got = f"group {number} has {' '.join(map(str, members)) or 'none'}"
        raise ScheduleError("a group has members, each named once", got, "name each member once")


def check_slot(slot: Slot, routes: Mapping[Lane, tuple[int, ...]], groups: int = 0) -> None:
    """Raise ``ScheduleError`` unless the slot has ops of known lanes, stages and groups, and of one sort.

    ``groups`` is the number of groups.  The sorts are compute, messages and collectives.
    """
    if not slot:
        raise ScheduleError("a slot holds at least one op", "a slot is empty", "leave it out")
    for op in slot:
        route = routes.get(op.lane)
        if route is None:
            raise ScheduleError("an op names a lane of the schedule", f"{op} names lane {op.lane}", "declare it first")
        if not 0 <= op.stage < len(route):
            raise ScheduleError(
                "an op names a stage of its lane",
                f"{op} names stage {op.stage}, and lane {op.lane} has stages 0 to {len(route) - 1}",
                "correct the op or lengthen the lane",
            )
        if not 0 <= op.mb <= LARGEST or not 0 <= (op.peer or 0) <= LARGEST:
            raise ScheduleError(
                f"microbatch and peer are numbers from 0 to {LARGEST}", f"there is {op}", "give numbers in this range"
            )
        if op.peer is not None and op.kind in COMPUTE:
            raise ScheduleError("only a message has a peer", f"{op} is compute", f"leave out @{op.peer}")
        if op.kind in COLLECTIVES:
            _check_collective(op, groups)
    if len(slot) > 1 and len({(op.kind in COMPUTE, op.kind in MESSAGES) for op in slot}) > 1:
        raise ScheduleError(
            "a slot is all compute, all messages or all collectives",
            f"{show_slot(slot)} mixes them",
            "put a space between them",
        )


def _check_collective(op: Op, groups: int) -> None:
    if op.mb and op.kind in WHOLE:
        raise ScheduleError(f"{op.kind} names no microbatch", f"there is microbatch {op.mb}", "give 0")
    if op.peer is None:
        return
    if op.kind is Kind.RS:
        raise ScheduleError(
            "RS has no group, since a rank drops weights by itself", f"there is {op}", "leave out the group"
        )
    if op.peer >= groups:
        got = f"{op} names group {op.peer}, and there are {groups}, counted from 0"
        raise ScheduleError("a collective names a group of the schedule", got, "declare it, or leave it out")
