"""A phase table: the order of a pipeline schedule as data, for every size at once.

A row is a count and a body.  The count is an affine expression in the sizes.  So the same rows can be expanded for one
size, and theorems can be proved about them for all sizes::

    Row("1", 2 * (N - h - 1), "RF0 F0 SF0")

``F0`` is the forward of the rank's chunk 0.  The k-th F of a chunk is that of microbatch k, and likewise for B and
the messages, so a table contains no microbatch numbers.  ``W0`` is the weight gradient of the ``B0`` before it; ``W``
without a chunk is the W that has been deferred longest.  Ops joined by ``+`` share a slot.  The messages between two
computes, of one row or of several, share a slot too.  A message beyond the end of a lane, or between two stages of
the same rank, is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from dualpipe.schedule.op import MESSAGES, B, Chunk, Kind, Lane, Op, Program, W, full_backwards
from dualpipe.schedule.routes import Routes


@dataclass(frozen=True)
class Affine:
    """``(sum of coefficient * symbol + constant) / divisor``, built from ``symbol`` by arithmetic operators."""

    terms: Mapping[str, int]
    constant: int = 0
    divisor: int = 1

    def __add__(self, other: Affine | int) -> Affine:
        other = affine(other)
        if self.divisor != other.divisor:
            divisor = self.divisor * other.divisor
            return replace(
                self.scaled(other.divisor) + other.scaled(self.divisor),
                divisor=divisor,
            )
        names = {**self.terms, **other.terms}
        terms = {name: self.terms.get(name, 0) + other.terms.get(name, 0) for name in names}
        return Affine({n: c for n, c in terms.items() if c}, self.constant + other.constant, self.divisor)

    def scaled(self, factor: int) -> Affine:
        """The numerator times ``factor``, with divisor 1."""
        return Affine({name: factor * c for name, c in self.terms.items() if factor}, factor * self.constant)

    def __mul__(self, factor: int) -> Affine:
        return replace(self.scaled(factor), divisor=self.divisor)

    def __floordiv__(self, divisor: int) -> Affine:
        return replace(self, divisor=self.divisor * divisor)

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Affine | int) -> Affine:
        return self + -affine(other)

    def __rsub__(self, other: int) -> Affine:
        return affine(other) - self

    __radd__ = __add__
    __rmul__ = __mul__

    def at(self, sizes: Mapping[str, int]) -> int:
        """The value at the given sizes; the division must leave no remainder."""
        value = sum(c * sizes[name] for name, c in self.terms.items()) + self.constant
        quotient, remainder = divmod(value, self.divisor)
        if remainder:
            raise AssertionError(f"{self} is not an integer at {dict(sizes)}")
        return quotient

    def __str__(self) -> str:
        terms = [f"{c:+d} {name}" for name, c in self.terms.items()] + [f"{self.constant:+d}"] * bool(self.constant)
        total = " ".join(terms) or "0"
        return total if self.divisor == 1 else f"({total})/{self.divisor}"


def affine(value: Affine | int) -> Affine:
    """A constant as an expression; an expression is returned unchanged."""
    return value if isinstance(value, Affine) else Affine({}, value)


def symbol(name: str) -> Affine:
    """The expression that consists only of this size."""
    return Affine({name: 1})


class Action(NamedTuple):
    """A kind and the chunk it works on; ``chunk`` is ``None`` for the W that has been deferred longest."""

    kind: Kind
    chunk: int | None

    def __str__(self) -> str:
        return self.kind if self.chunk is None else f"{self.kind}{self.chunk}"


Step = tuple[Action, ...]


def steps(body: str) -> tuple[Step, ...]:
    """Parse a row's body: ``"RF0 F0+B1+W1 W"``."""
    return tuple(tuple(map(_action, step.split("+"))) for step in body.split())


def _action(text: str) -> Action:
    kind = Kind(text.rstrip("01"))
    chunk = text[len(kind) :]
    return Action(kind, int(chunk) if chunk else None)


@dataclass(frozen=True)
class Row:
    """``count`` repetitions of ``body``.  The names of a phase's rows begin with its number: "4 first", "4 last"."""

    name: str
    count: Affine | int
    body: str

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        return steps(self.body)

    def times(self, sizes: Mapping[str, int]) -> int:
        count = affine(self.count).at(sizes)
        if count < 0:
            raise AssertionError(f"row {self.name!r} repeats {count} times at {dict(sizes)}")
        return count


Table = tuple[Row, ...]


def vary(table: Table, *rows: Row) -> Table:
    """The table with ``rows`` in place of the rows of the same names, so that a variant states only its differences."""
    changed = {row.name: row for row in rows}
    unknown = changed.keys() - {row.name for row in table}
    if unknown:
        raise AssertionError(f"the table has no rows {sorted(unknown)}")
    return tuple(changed.get(row.name, row) for row in table)


def expand(
    table: Table, sizes: Mapping[str, int], chunks: tuple[Chunk, ...], routes: Mapping[Lane, tuple[int, ...]]
) -> Program:
    """The slots of one rank.

    ``sizes`` gives the table's symbols their values; ``chunks[c]`` is the table's chunk ``c``.
    """
    return tuple(tuple(op for op, _ in slot) for slot in trace(table, sizes, chunks, routes))


def trace(
    table: Table, sizes: Mapping[str, int], chunks: tuple[Chunk, ...], routes: Mapping[Lane, tuple[int, ...]]
) -> tuple[tuple[tuple[Op, Row], ...], ...]:
    """The slots of one rank, each op with the row that it was expanded from."""
    exists = _existing_messages(chunks, Routes(routes))
    done: dict[Action, int] = {}
    deferred: deque[Op] = deque()
    slots: list[tuple[tuple[Op, Row], ...]] = []
    messages: list[tuple[Op, Row]] = []

    def op(action: Action, row: Row) -> Op:
        kind, chunk = action
        if chunk is None:
            if not deferred:
                raise IndexError(f"row {row.name!r} runs a W and none is deferred at {dict(sizes)}")
            oldest = deferred.popleft()
            return Op(W, oldest.lane, oldest.stage, oldest.mb)
        mb = done[Action(B, chunk)] - 1 if kind is W else done.get(action, 0)
        done[action] = mb + 1
        lane, stage = chunks[chunk]
        return Op(kind, lane, stage, mb)

    for row in table:
        for _ in range(row.times(sizes)):
            for step in row.steps:
                if step[0].kind in MESSAGES:
                    messages += [(op(action, row), row) for action in step if action in exists]
                    continue
                if messages:
                    slots.append(tuple(messages))
                    messages.clear()
                slot = tuple((op(action, row), row) for action in step)
                slots.append(slot)
                deferred += _deferred(slot)
    if messages:
        slots.append(tuple(messages))
    return tuple(slots)


def _existing_messages(chunks: Iterable[Chunk], routes: Routes) -> frozenset[Action]:
    """The message actions whose partner is another rank."""
    return frozenset(
        Action(kind, number)
        for number, chunk in enumerate(chunks)
        for kind in MESSAGES
        if routes.crosses(Op(kind, chunk.lane, chunk.stage, 0))
    )


def _deferred(slot: Sequence[tuple[Op, Row]]) -> list[Op]:
    """The backwards of a slot whose W comes in a later slot."""
    full = full_backwards(op for op, _ in slot)
    return [op for op, _ in slot if op.kind is B and op.task not in full]
