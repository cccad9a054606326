"""Difference logic: integer variables, and facts ``later - earlier >= gap`` about two of them.

A set of such facts is a ``Problem``.  Z3 decides it in a process of its own (``proofs.solver``) and names the facts
that contradict each other.  ``smtlib_of`` writes the same facts for any solver.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from proofs.solver import SHARED, Solver
from proofs.verdict import Unknown

Why = tuple[object, ...]
"""A format string for ``str.format`` and its arguments; formatted only when it is printed."""


class Link(str):
    """The text of a fact that is one link of a chain; its last two arguments are the two ends of the link.

    ``joined`` merges consecutive links into one fact.
    """


class Fact(NamedTuple):
    """``later - earlier >= gap``, and why."""

    earlier: int
    later: int
    gap: int
    why: Why

    def __str__(self) -> str:
        return str(self.why[0]).format(*self.why[1:], gap=self.gap)


@dataclass
class Problem:
    """Named variables and facts about them.  It is satisfiable exactly if the check holds."""

    title: str
    names: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    def variable(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def later(self, earlier: int, later: int, *why: object, gap: int = 1) -> None:
        """Add the fact that ``later`` is at least ``gap`` after ``earlier``."""
        self.facts.append(Fact(earlier, later, gap, why))

    def exactly(self, earlier: int, later: int, gap: int, *why: object) -> None:
        """Add the fact that ``later`` is exactly ``gap`` after ``earlier``."""
        self.later(earlier, later, *why, gap=gap)
        self.later(later, earlier, *why, gap=-gap)


class Contradiction(NamedTuple):
    """A smallest set of contradictory facts: a cycle, each fact leading to the next and the last to the first."""

    core: tuple[Fact, ...]


def decide(problem: Problem, timeout_s: float | None = None, solver: Solver = SHARED) -> Contradiction | Unknown | None:
    """``None`` if all facts can hold together, a ``Contradiction`` if not, ``Unknown`` without an answer."""
    answer = solver.ask((fact[:3] for fact in problem.facts), timeout_s)
    return Contradiction(tuple(problem.facts[index] for index in answer)) if isinstance(answer, list) else answer


def joined(cycle: tuple[Fact, ...]) -> tuple[Fact, ...]:
    """The cycle with consecutive links of a chain merged into one fact, which is shorter to read."""
    start = next((index for index, fact in enumerate(cycle) if not isinstance(fact.why[0], Link)), 0)
    facts: list[Fact] = []
    for fact in cycle[start:] + cycle[:start]:
        last = facts[-1] if facts else None
        if last is not None and _links(last, fact):
            facts[-1] = Fact(last.earlier, fact.later, last.gap + fact.gap, (*last.why[:-1], fact.why[-1]))
        else:
            facts.append(fact)
    return tuple(facts)


def _links(one: Fact, other: Fact) -> bool:
    return isinstance(one.why[0], Link) and one.why[:-2] == other.why[:-2] and one.why[-1] == other.why[-2]


def smtlib_of(problems: list[Problem]) -> str:
    """The problems as SMT-LIB 2.6, one ``check-sat`` each: ``sat`` where the check holds, ``unsat`` where it fails."""
    parts = ["(set-logic QF_IDL)"]
    for problem in problems:
        parts += ["", f"; {problem.title}: sat if it holds", "(push 1)"]
        parts += [f"(declare-const |{name}| Int)" for name in problem.names]
        for number, fact in enumerate(problem.facts):
            earlier, later = (f"|{problem.names[variable]}|" for variable in (fact.earlier, fact.later))
            formula = f"(>= (- {later} {earlier}) {_integer(fact.gap)})"
            parts.append(f"(assert (! {formula} :named f{number})) ; {fact}")
        parts += ["(check-sat)", "(pop 1)"]
    return "\n".join(parts) + "\n"


def _integer(value: int) -> str:
    return str(value) if value >= 0 else f"(- {-value})"
