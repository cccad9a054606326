"""Converts what callers give to plain types: numpy's integers, kinds and lanes as text, lists instead of tuples.

A ``Schedule`` holds ``int``, ``str``, ``Kind``, ``Lane``, ``Op`` and tuples of these, and nothing else.  Every function
here raises ``ScheduleError`` for a value that cannot be converted.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from operator import index
from typing import Any, TypeVar

from dualpipe.schedule.failure import Failure
from dualpipe.schedule.op import LARGEST, Kind, Lane, Op, Program, ScheduleError, Slot

_E = TypeVar("_E", Kind, Lane)


def text(name: object) -> str:
    """A schedule's name as a plain ``str``."""
    if not isinstance(name, str):
        raise ScheduleError("a schedule's name is a str", f"got {seen(name)}", 'leave it out, or give "" for none')
    return str.__str__(name)


def programs(programs: object) -> tuple[Program, ...]:
    """The programs as tuples of tuples of ``Op``; programs that already are this are returned as they are."""
    if _is_plain(programs):
        return programs  # type: ignore[return-value] # just checked
    return tuple(
        tuple(_slot(slot) for slot in items(program, "a program is a sequence of slots"))
        for program in items(programs, "programs are a sequence with one program for each rank")
    )


def groups(given: object) -> tuple[tuple[int, ...], ...]:
    """The members of every group as tuples of ``int``."""
    rule = "groups are a sequence with the ranks of each group"
    return tuple(tuple(number(rank, "a rank") for rank in items(members, rule)) for members in items(given, rule))


def failures(given: object) -> tuple[Failure, ...]:
    """The failures, each of a rank and a text."""
    rule = "failures are a sequence of pairs: a rank and what happened to it"
    found = []
    for failure in items(given, rule):
        fields = items(failure, rule)
        if len(fields) != 2 or not isinstance(fields[1], str):
            raise ScheduleError(rule, f"got {seen(failure)}", 'write (1, "raised IndexError")')
        found.append(Failure(number(fields[0], "a rank"), str.__str__(fields[1])))
    return tuple(found)


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
        raise ScheduleError("a slot is a sequence of ops", f"got the single op {seen(slot)}", "write (op,)")
    return tuple(_op(op) for op in items(slot, "a slot is a sequence of ops"))


def _op(op: object) -> Op:
    fields = items(op, "an op is Op(kind, lane, stage, mb), with a peer where it is a message that names one")
    if len(fields) not in (4, 5):
        raise ScheduleError("an op has a kind, lane, stage, mb and optionally a peer", f"got {seen(op)}", "use Op")
    kind, lane, stage, mb, *peer = fields
    return Op(
        member(Kind, kind),
        member(Lane, lane),
        number(stage, "a stage"),
        number(mb, "a microbatch"),
        number(peer[0], "a peer") if peer and peer[0] is not None else None,
    )


def items(given: object, rule: str) -> tuple[Any, ...]:
    """The items of an iterable that has an order."""
    try:
        ordered = None if isinstance(given, str | bytes | Mapping | Set) else iter(given)  # type: ignore[call-overload]
    except TypeError:
        ordered = None
    if ordered is None:
        raise ScheduleError(rule, f"got {seen(given)}", "give a tuple or a list")
    return tuple(ordered)


def number(given: object, what: str) -> int:
    if type(given).__name__ in ("bool", "bool_"):
        raise ScheduleError(f"{what} is a whole number", f"got {seen(given)}", "give an int")
    try:
        number = index(given)  # type: ignore[arg-type] # int() decides
    except Exception as error:
        raise ScheduleError(f"{what} is a whole number", f"got {seen(given)}", "give an int") from error
    if abs(number) > LARGEST:
        raise ScheduleError(
            f"{what} is a number from 0 to {LARGEST}", f"got {seen(number)}", "give a number in this range"
        )
    return number


def member(kinds: type[_E], given: object) -> _E:
    if isinstance(given, str):
        with suppress(ValueError):
            return kinds(str.__str__(given))
    known = " ".join(kinds)
    raise ScheduleError(f"a {kinds.__name__.lower()} is one of {known}", f"got {seen(given)}", "use one of these")


def seen(given: object) -> str:
    """Describe any value for an error: its type, and its text if that is short and does not raise."""
    try:
        text = repr(given)
    except Exception:  # a number of more digits than Python prints, or a repr that raises
        text = ""
    kind = type(given).__name__
    return f"{text} of type {kind}" if text and len(text) <= 40 and "\n" not in text else f"a value of type {kind}"
