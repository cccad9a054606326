"""The vocabulary that everything else consumes: ``Op``, ``Slot`` and the immutable ``Schedule``.

An op is named in *world coordinates*: stage, microbatch and lane mean the same thing on every rank::

    lane >   rank 0 -> rank 1 -> rank 2 -> rank 3      0F5>  stage 0 runs the forward of microbatch 5
    lane <   rank 3 -> rank 2 -> rank 1 -> rank 0      0F5<  the same layers, the other way round

``Schedule.needs`` is the only copy of the dependency rule in the package.  ``dualpipe.schedulefile`` reads
and prints the text form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from operator import index
from typing import Any, NamedTuple, TypeVar

from dualpipe.errors import RuleError as RuleError


class Kind(StrEnum):
    """What an op does.  B is the backward for the input and W the one for the weights, as in the zero-bubble paper."""

    F = "F"
    B = "B"
    W = "W"
    SF = "SF"
    RF = "RF"
    SB = "SB"
    RB = "RB"

    __hash__ = str.__hash__


class Lane(StrEnum):
    """The direction in which a microbatch travels."""

    UP = ">"
    DOWN = "<"

    __hash__ = str.__hash__


F, B, W, SF, RF, SB, RB = Kind
UP, DOWN = Lane
COMPUTE = frozenset({F, B, W})
SENDS = frozenset({SF, SB})
RECEIVES = frozenset({RF, RB})
MESSAGES = SENDS | RECEIVES


class ScheduleError(RuleError):
    """A value that cannot be a schedule."""


class Op(NamedTuple):
    """One thing that one rank does for one microbatch: ``Op(F, UP, stage=2, mb=3)``, printed ``2F3>``.

    ``peer`` is the rank at the other end of a message where a file names it; ``None`` means the neighbour that
    follows from the lane (see ``Schedule.peer``).
    """

    kind: Kind
    lane: Lane
    stage: int
    mb: int
    peer: int | None = None

    def __str__(self) -> str:
        peer = "" if self.peer is None else f"@{self.peer}"
        return f"{self.stage}{self.kind}{self.mb}{self.lane}{peer}"

    @property
    def bare(self) -> Op:
        """The op without its peer: the name under which ``needs`` speaks of it."""
        return self if self.peer is None else Op(self.kind, self.lane, self.stage, self.mb)


Slot = tuple[Op, ...]
Program = tuple[Slot, ...]


def show_slot(slot: Slot) -> str:
    """The text of a slot: its ops joined by ``+``."""
    return "+".join(map(str, slot))


class Placed(NamedTuple):
    """An op with the place where it stands: rank, slot number within the rank, position within the slot."""

    rank: int
    slot: int
    position: int
    op: Op


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order.  An immutable value.

    The arguments are normalised once, here: integers of any type (numpy's included) become ``int``, kinds and lanes
    given as text become ``Kind`` and ``Lane``, any ordered iterable becomes a tuple, a plain tuple of an op's fields
    becomes an ``Op``, and the routes are copied.  So every schedule holds these types and nothing else.

    Parameters
    ----------
    routes:
        For each lane the rank that holds stage 0, 1, 2, ...  Stage ``s`` of two lanes is the same layers, so two
        lanes mean two copies of each stage's weights.
    programs:
        For each rank its slots.  The ops of a slot are issued together, slots run in order.
    name:
        A label; it takes no part in what the schedule means, only in how it is printed and whether a published
        memory bound applies.

    Raises
    ------
    ScheduleError
        If a part has another type (a bool or a float as a number, a set or a text as a sequence), the name is not one
        word, a route names a rank without a program, an op a lane or stage that does not exist or a number that is
        negative or above 999999999, or a slot is empty or mixes compute with messages.
    """

    routes: Mapping[Lane, tuple[int, ...]]
    programs: tuple[Program, ...]
    name: str = ""

    def __post_init__(self) -> None:
        for field, value in (
            ("name", _text(self.name)),
            ("routes", _routes(self.routes)),
            ("programs", _programs(self.programs)),
        ):
            object.__setattr__(self, field, value)
        check_name(self.name)
        check_routes(self.routes, len(self.programs))
        for program in self.programs:
            for slot in program:
                check_slot(slot, self.routes)

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
        count = dict.fromkeys(self.routes, 0)
        for placed in self:
            lane, mb = placed.op.lane, placed.op.mb
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
        """The schedule with the ops of these kinds alone, such as F, SF and RF for an evaluation."""
        programs = tuple(
            tuple(kept for slot in program if (kept := tuple(op for op in slot if op.kind in kinds)))
            for program in self.programs
        )
        return Schedule(self.routes, programs, self.name)

    def rank_of(self, op: Op) -> int:
        """The rank that holds the op's stage."""
        return self.routes[op.lane][op.stage]

    def is_first(self, op: Op) -> bool:
        """Whether the op's stage is the one that reads the data."""
        return op.stage == 0

    def is_last(self, op: Op) -> bool:
        """Whether the op's stage is the one that computes the loss."""
        return op.stage == len(self.routes[op.lane]) - 1

    def neighbour(self, op: Op) -> int | None:
        """The rank that a message's partner stage is on, or ``None`` beyond the end of the lane."""
        route = self.routes[op.lane]
        other = op.stage + (1 if op.kind in (SF, RB) else -1)
        return route[other] if 0 <= other < len(route) else None

    def peer(self, op: Op) -> int | None:
        """The rank at the other end of a message: the one the file names, else the lane's neighbour."""
        return self.neighbour(op) if op.peer is None else op.peer

    def crosses(self, op: Op) -> bool:
        """Whether a message op joins two ranks: not beyond a lane's end, nor where neighbours share a rank."""
        neighbour = self.neighbour(op)
        return neighbour is not None and neighbour != self.rank_of(op)

    def needs(self, op: Op) -> tuple[Op, ...]:
        """The ops that must be over before ``op`` can be: the only copy of this rule.

        A receive needs its send, which is on another rank; every other need is on the op's own rank.  Where
        neighbouring stages share a rank there is no message, and F needs F (or B needs B) directly::

            0F -> 0SF -> 1RF -> 1F -> ... -> lastF -> lastB -> ... -> 1SB -> 0RB -> 0B -> 0W
        """
        kind, lane, stage, mb, _ = op
        match kind:
            case Kind.F if stage == 0:
                return ()
            case Kind.F:
                arrival = Op(RF, lane, stage, mb)
                return (arrival if self.crosses(arrival) else Op(F, lane, stage - 1, mb),)
            case Kind.B if self.is_last(op):
                return (Op(F, lane, stage, mb),)
            case Kind.B:
                arrival = Op(RB, lane, stage, mb)
                gradient = arrival if self.crosses(arrival) else Op(B, lane, stage + 1, mb)
                return (Op(F, lane, stage, mb), gradient)
            case Kind.W:
                return (Op(B, lane, stage, mb),)
            case Kind.SF:
                return (Op(F, lane, stage, mb),)
            case Kind.SB:
                return (Op(B, lane, stage, mb),)
            case Kind.RF:
                return (Op(SF, lane, stage - 1, mb),) if stage > 0 else ()
            case Kind.RB:
                return () if self.is_last(op) else (Op(SB, lane, stage + 1, mb),)


LARGEST = 999_999_999
"""The largest number that an op may name, so that what reads a file never meets one that it cannot hold."""


_E = TypeVar("_E", Kind, Lane)


def _text(name: object) -> str:
    """A schedule's name as a plain ``str``."""
    if not isinstance(name, str):
        raise ScheduleError("a schedule's name is a str", f"got {_seen(name)}", 'leave it out, or give "" for none')
    return str.__str__(name)


def _routes(routes: object) -> dict[Lane, tuple[int, ...]]:
    """A copy of the routes, with ``Lane`` as keys and tuples of ``int`` as values."""
    if not isinstance(routes, Mapping):
        raise ScheduleError(
            "routes are a mapping from lanes to the ranks of their stages",
            f"got {_seen(routes)}",
            'give such as {">": (0, 1, 2, 3)}',
        )
    what = "a lane's route is a sequence of ranks"
    return {
        _member(Lane, lane): tuple(_number(rank, "a rank") for rank in _items(route, what))
        for lane, route in routes.items()
    }


def _programs(programs: object) -> tuple[Program, ...]:
    """The programs as tuples of tuples of ``Op``; the very same object where that is what it is already."""
    if _is_plain(programs):
        return programs  # type: ignore[return-value] # just seen
    return tuple(
        tuple(_slot(slot) for slot in _items(program, "a program is a sequence of slots"))
        for program in _items(programs, "programs are a sequence with one program for each rank")
    )


def _is_plain(programs: object) -> bool:
    if type(programs) is not tuple:
        return False
    for program in programs:
        if type(program) is not tuple:
            return False
        for slot in program:
            if type(slot) is not tuple:
                return False
            for op in slot:
                if type(op) is not Op or len(op) != 5:
                    return False
                kind, lane, stage, mb, peer = op
                if type(kind) is not Kind or type(lane) is not Lane or type(stage) is not int or type(mb) is not int:
                    return False
                if peer is not None and type(peer) is not int:
                    return False
                if min(stage, mb, peer or 0) < 0 or max(stage, mb, peer or 0) > LARGEST:
                    return False  # reported by the checks, after numbers too large to print were refused
    return True


def _slot(slot: object) -> Slot:
    if isinstance(slot, Op):
        raise ScheduleError("a slot is a sequence of ops", f"got the single op {_seen(slot)}", "write (op,)")
    return tuple(_op(op) for op in _items(slot, "a slot is a sequence of ops"))


def _op(op: object) -> Op:
    fields = _items(op, "an op is Op(kind, lane, stage, mb), with a peer where it is a message that names one")
    if len(fields) not in (4, 5):
        raise ScheduleError("an op has a kind, lane, stage, mb and optionally a peer", f"got {_seen(op)}", "use Op")
    kind, lane, stage, mb, *peer = fields
    return Op(
        _member(Kind, kind),
        _member(Lane, lane),
        _number(stage, "a stage"),
        _number(mb, "a microbatch"),
        _number(peer[0], "a peer") if peer and peer[0] is not None else None,
    )


def _items(given: object, rule: str) -> tuple[Any, ...]:
    """The items of an iterable that has an order."""
    try:
        ordered = None if isinstance(given, str | bytes | Mapping | Set) else iter(given)  # type: ignore[call-overload]
    except TypeError:
        ordered = None
    if ordered is None:
        raise ScheduleError(rule, f"got {_seen(given)}", "give a tuple or a list")
    return tuple(ordered)


def _number(given: object, what: str) -> int:
    if type(given).__name__ in ("bool", "bool_"):
        raise ScheduleError(f"{what} is a whole number", f"got {_seen(given)}", "give an int")
    try:
        number = index(given)  # type: ignore[arg-type] # that is the question
    except Exception as error:
        raise ScheduleError(f"{what} is a whole number", f"got {_seen(given)}", "give an int") from error
    if abs(number) > LARGEST:
        raise ScheduleError(f"{what} is a number from 0 to {LARGEST}", f"got {_seen(number)}", "correct it")
    return number


def _member(kinds: type[_E], given: object) -> _E:
    if isinstance(given, str):
        with suppress(ValueError):
            return kinds(str.__str__(given))
    known = " ".join(kinds)
    raise ScheduleError(f"a {kinds.__name__.lower()} is one of {known}", f"got {_seen(given)}", "correct it")


def _seen(given: object) -> str:
    """A foreign value for an error: its type, and its text where that is short and can be had."""
    try:
        text = repr(given)
    except Exception:  # a number of more digits than Python prints, or a repr that raises
        text = ""
    kind = type(given).__name__
    return f"{text} of type {kind}" if text and len(text) <= 40 and "\n" not in text else f"a value of type {kind}"


def check_name(name: str) -> None:
    """Raise ``ScheduleError`` unless the name is empty or one printable word, without ``#``, as the text form needs."""
    if name and (not name.isprintable() or " " in name or "#" in name):
        raise ScheduleError(
            "a schedule's name is one printable word without #", f"it is {name!r}", "put dashes for what is not allowed"
        )


def check_routes(routes: Mapping[Lane, tuple[int, ...]], ranks: int) -> None:
    """Raise ``ScheduleError`` unless every lane has stages, each on one of the ranks, and all the same number."""
    if not routes:
        raise ScheduleError("a schedule has at least one lane", "there is none", "add a line such as 'lane > 0 1 2 3'")
    for lane, route in routes.items():
        if not route:
            raise ScheduleError("a lane has at least one stage", f"lane {lane} has none", "name each stage's rank")
        for stage, rank in enumerate(route):
            if not 0 <= rank < ranks:
                raise ScheduleError(
                    "a stage is held by a rank that has a program",
                    f"lane {lane} puts stage {stage} on rank {rank}, and there are {ranks} ranks, counted from 0",
                    "add the rank or correct the lane",
                )
    depths = [f"lane {lane} has {len(route)} stage{'s' if len(route) > 1 else ''}" for lane, route in routes.items()]
    if len(set(map(len, routes.values()))) > 1:
        raise ScheduleError("all lanes run the same model", " and ".join(depths), "give each lane as many stages")


def check_slot(slot: Slot, routes: Mapping[Lane, tuple[int, ...]]) -> None:
    """Raise ``ScheduleError`` unless the slot holds ops of known lanes and stages, all compute or all messages."""
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
            raise ScheduleError(f"microbatch and peer are numbers from 0 to {LARGEST}", f"there is {op}", "correct it")
        if op.peer is not None and op.kind in COMPUTE:
            raise ScheduleError("only a message has a peer", f"{op} is compute", f"leave out @{op.peer}")
    if len(slot) > 1 and len({op.kind in COMPUTE for op in slot}) > 1:
        raise ScheduleError(
            "a slot is all compute or all messages", f"{show_slot(slot)} mixes them", "put a space between them"
        )
