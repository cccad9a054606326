"""A rank's phase table with the sizes left open.

A ``Position`` is one action of one step of one row, in an iteration that is itself a symbol.  So its microbatch, its
number among the messages of a channel, and the number of computes before it are affine expressions.  Nothing here
expands or repeats a table: the rows are those that ``dualpipe.schedule.generate`` expands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property

from dualpipe.schedule import MESSAGES, B, W
from dualpipe.schedule.phase_table import Action, Affine, Row, Step, Table, affine, symbol
from proofs.memory import full_backwards
from proofs.theorems.constraint import Constraints, at_least, below, substitute

Mark = Callable[[Step, int], bool]
"""Whether to count the action with this number in a step."""


@dataclass(frozen=True)
class Rank:
    """One kind of rank: all ranks that run this table with sizes in ``domain``.

    Parameters
    ----------
    kind:
        The name of the kind.
    table:
        The table from which the schedule is expanded.
    sizes:
        The table's own symbols, in the symbols that the theorem quantifies over.
    domain:
        The sizes, and the ranks at each size, that the kind covers.
    exists:
        The condition under which a message action exists: always if it is not listed, never if it has ``None``.
    suffix:
        The end of the rank's own symbols, which tells two ranks apart in one obligation.
    """

    kind: str
    table: Table
    sizes: Mapping[str, Affine]
    domain: Constraints
    exists: Mapping[Action, Constraints | None] = field(default_factory=dict)
    suffix: str = ""

    @property
    def name(self) -> str:
        """The kind, with the suffix that tells two ranks apart."""
        return self.kind + self.suffix

    @cached_property
    def symbols(self) -> dict[str, Affine]:
        """The symbols of the kind, each under its name in the theorem, which may have the suffix."""
        names = sorted({name for size in self.sizes.values() for name in size.terms})
        return {name.removesuffix(self.suffix): symbol(name) for name in names}

    def count(self, row: Row) -> Affine:
        """How often the row repeats, in the theorem's symbols."""
        return substitute(row.count, self.sizes)

    def total(self, mark: Mark) -> Affine:
        """The number of marked actions in the whole program."""
        return self._before_row(len(self.table), mark)

    def _before_row(self, number: int, mark: Mark) -> Affine:
        known = self._counted
        if (number, mark) not in known:
            total = affine(0)
            for row in self.table[:number]:
                if often := _occurrences(row.steps, mark):
                    total = total + often * self.count(row)
            known[number, mark] = total
        return known[number, mark]

    @cached_property
    def _counted(self) -> dict[tuple[int, Mark], Affine]:
        """The results of ``_before_row``."""
        return {}

    def positions(self, mark: Mark, iteration: str) -> list[Position]:
        """Every marked action that exists at some size, in the iteration with the symbol ``iteration``."""
        return [
            Position(self, number, s, p, symbol(iteration))
            for number, row in enumerate(self.table)
            for s, step in enumerate(row.steps)
            for p, action in enumerate(step)
            if mark(step, p) and self.exists.get(action, ()) is not None
        ]


@dataclass(frozen=True)
class Position:
    """Action number ``index`` of ``step`` of ``row`` of a rank's table, in one iteration of the row."""

    rank: Rank
    row: int
    step: int
    index: int
    iteration: Affine

    @property
    def the_row(self) -> Row:
        return self.rank.table[self.row]

    @property
    def the_step(self) -> Step:
        return self.the_row.steps[self.step]

    @property
    def action(self) -> Action:
        return self.the_step[self.index]

    def __str__(self) -> str:
        return f"{self.action} in row {self.the_row.name!r} step {self.step} of {self.rank.name}"

    @cached_property
    def guard(self) -> Constraints:
        """The condition that the iteration and the message exist."""
        count = self.rank.count(self.the_row)
        exists = self.rank.exists.get(self.action, ()) or ()
        return (at_least(self.iteration, 0), below(self.iteration, count), *exists)

    def before(self, mark: Mark) -> Affine:
        """The number of marked actions before this one in the rank's program."""
        return self._until(mark, self.index)

    def through_step(self, mark: Mark) -> Affine:
        """The number of marked actions before the end of this one's step."""
        return self._until(mark, len(self.the_step))

    def before_step(self, mark: Mark) -> Affine:
        """The number of marked actions before this one's step."""
        return self._until(mark, 0)

    def _until(self, mark: Mark, index: int) -> Affine:
        known = self._counted
        if (mark, index) not in known:
            steps = self.the_row.steps
            each, earlier = _occurrences(steps, mark), _occurrences(steps[: self.step], mark)
            here = sum(mark(self.the_step, p) for p in range(index))
            before = self.rank._before_row(self.row, mark)
            known[mark, index] = before + each * self.iteration + (earlier + here)
        return known[mark, index]

    @cached_property
    def _counted(self) -> dict[tuple[Mark, int], Affine]:
        """The results of ``_until``, since a position is compared with many others."""
        return {}

    @cached_property
    def mb(self) -> Affine:
        """The microbatch: the number of equal actions before it; for the W of a chunk, that of the last B before it."""
        kind, chunk = self.action
        if kind is W:
            return self.before(exactly(Action(B, chunk))) - 1
        return self.before(exactly(self.action))

    @property
    def computes(self) -> Affine:
        """The number of compute slots before this step."""
        return self.before_step(is_compute)

    @cached_property
    def slot(self) -> Affine:
        """A number that orders slots: compute k is ``2k + 1``, and the message slot before it is ``2k``."""
        return 2 * self.computes + (0 if self.action.kind in MESSAGES else 1)


def earlier(first: Position, second: Position) -> Affine:
    """At least zero exactly if ``first`` runs before ``second``: in an earlier slot, or left of it in the same."""
    left = (first.row, first.step) == (second.row, second.step) and first.index < second.index
    return second.slot - first.slot - (0 if left else 1)


def _occurrences(steps: tuple[Step, ...], mark: Mark) -> int:
    return sum(mark(step, p) for step in steps for p in range(len(step)))


@cache
def exactly(*actions: Action) -> Mark:
    """Marks these actions.  The same actions give the same mark, under which counts are cached."""
    return lambda step, p: step[p] in actions


def is_compute(step: Step, p: int) -> bool:
    """Marks each compute slot once."""
    return p == 0 and step[0].kind not in MESSAGES


def is_push(step: Step, p: int) -> bool:
    """Marks a B that is not part of a full backward: its W is deferred, so it joins the queue."""
    kind, chunk = step[p]
    return kind is B and chunk not in full_backwards(step)


def is_pop(step: Step, p: int) -> bool:
    """Marks a W without a chunk, which runs the longest deferred W."""
    return step[p] == Action(W, None)


def is_weight(step: Step, p: int) -> bool:
    """Marks every W, with or without a chunk."""
    return step[p].kind is W


def computes_of(steps: tuple[Step, ...]) -> list[int]:
    """The numbers of a body's steps that are computes."""
    return [number for number, step in enumerate(steps) if is_compute(step, 0)]
