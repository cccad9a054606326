"""A phase table: the order of a pipeline schedule as data, for every size at once.

A row has a name, a count and a body.  The count is an affine expression in the sizes.  So the same rows can be expanded
for one size, and theorems can be proved about them for all sizes::

    Row("1", 2 * (N - h - 1), "RF0 F0 SF0")

A body is a sequence of steps, and each step has one or several actions.  ``F0`` is the forward of the rank's chunk 0.
The k-th F of a chunk, counted from 0, is that of microbatch k, and likewise for B and for each kind of message, so a
table contains no microbatch numbers.  ``W0`` is the weight gradient of the ``B0`` before it; ``W`` without a chunk is
the W that has been deferred longest.  Computes joined by ``+`` are one step and share a slot.  All messages between two
computes share a slot, even if they are in different rows.  A message that would leave the end of a lane, or pass
between two stages of one rank, is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from dualpipe.schedule.op import MESSAGES, B, Chunk, Kind, Lane, Op, Program, W
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
"""Actions joined by ``+`` in a body: computes that share a slot, or messages."""


def steps(body: str) -> tuple[Step, ...]:
    """Parse a row's body, such as ``"RF0 F0+B1+W1 W"``."""
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
        """How often the body is repeated at the given sizes."""
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
    return tuple(ops for ops, _ in _slots(table, sizes, chunks, routes))


def trace(
    table: Table, sizes: Mapping[str, int], chunks: tuple[Chunk, ...], routes: Mapping[Lane, tuple[int, ...]]
) -> tuple[tuple[tuple[Op, Row], ...], ...]:
    """The slots of one rank, each op with the row that it was expanded from."""
    return tuple(tuple(zip(*slot, strict=True)) for slot in _slots(table, sizes, chunks, routes))


def _slots(
    table: Table, sizes: Mapping[str, int], chunks: tuple[Chunk, ...], routes: Mapping[Lane, tuple[int, ...]]
) -> Iterator[tuple[tuple[Op, ...], tuple[Row, ...]]]:
    """The slots of one rank, each with the rows that its ops were expanded from."""
    exists = _existing_messages(chunks, Routes(routes))
    counts = [0] * (len(chunks) * len(Kind))  # for each chunk and kind, how many of its ops there are so far
    deferred: deque[Op] = deque()
    messages: list[Op] = []
    rows: list[Row] = []
    make = tuple.__new__  # Op(...) takes three times as long
    for row in table:
        times = row.times(sizes)
        templates = [_template(step, chunks, exists) for step in row.steps]
        for _ in range(times):
            for template in templates:
                ops = []
                for kind, lane, stage, counter in template.ops:
                    if counter is None:
                        if not deferred:
                            raise IndexError(f"row {row.name!r} runs a deferred W at {dict(sizes)}, but none is left")
                        ops.append(deferred.popleft()._replace(kind=W))
                        continue
                    mb = counts[counter]
                    if kind is W:
                        mb -= 1  # a W has the counter of its B, which has been increased already
                    else:
                        counts[counter] = mb + 1
                    ops.append(make(Op, (kind, lane, stage, mb, None)))
                if template.defers is None:
                    messages += ops
                    rows += [row] * len(ops)
                    continue
                if messages:
                    yield tuple(messages), tuple(rows)
                    messages.clear()
                    rows.clear()
                yield tuple(ops), (row,) * len(ops)
                for position in template.defers:
                    deferred.append(ops[position])
    if messages:
        yield tuple(messages), tuple(rows)


class _Template(NamedTuple):
    """A step for the chunks of one rank: its ops, still without microbatches.

    ``ops`` gives each op's kind, lane and stage, and the index of the counter that yields its microbatch.  A W uses the
    counter of its B.  The W that has been deferred longest has ``None``.  ``defers`` has the positions of those B whose
    W is in a later step; it is ``None`` if the step is messages.
    """

    ops: tuple[tuple[Kind, Lane, int, int | None], ...]
    defers: tuple[int, ...] | None


def _template(step: Step, chunks: tuple[Chunk, ...], exists: frozenset[Action]) -> _Template:
    """The step for these chunks, without the messages that do not exist on this rank."""
    kinds = tuple(Kind)
    messages = step[0].kind in MESSAGES
    ops: list[tuple[Kind, Lane, int, int | None]] = []
    for action in step:
        if action.chunk is None:
            ops.append((action.kind, *chunks[0], None))
        elif not messages or action in exists:
            counter = action.chunk * len(kinds) + kinds.index(B if action.kind is W else action.kind)
            ops.append((action.kind, *chunks[action.chunk], counter))
    if messages:
        return _Template(tuple(ops), None)
    with_w = {action.chunk: at for at, action in enumerate(step) if action.kind is W}
    backwards = ((at, action.chunk) for at, action in enumerate(step) if action.kind is B)
    return _Template(tuple(ops), tuple(at for at, chunk in backwards if with_w.get(chunk, -1) < at))


def _existing_messages(chunks: Iterable[Chunk], routes: Routes) -> frozenset[Action]:
    """The sends and receives of these chunks that have another rank at the other end."""
    return frozenset(
        Action(kind, number)
        for number, chunk in enumerate(chunks)
        for kind in MESSAGES
        if routes.crosses(Op(kind, chunk.lane, chunk.stage, 0))
    )
