"""Difference logic: integers, and facts that one is at least so much later than another.

A set of such facts is a ``Problem``.  Z3's dense difference-logic solver decides it (``arith.solver=1`` of
``SimpleSolver``: Floyd-Warshall on the graph of differences), every fact guarded by a name, so that a contradiction
comes with the names that make it.  ``smtlib_of`` writes the same facts for any solver.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import z3
from z3 import z3core

from proofs.verdict import Unknown

Why = tuple[object, ...]
"""A text with places for what follows it, as in ``str.format``; put together only when it is told."""


class Link(str):
    """The text of a fact that is one link of a chain: its last two places are where the link begins and ends.

    Several in a row are told as one.
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
    """Variables, named, and facts about them.  It is satisfiable exactly where what it asks holds."""

    title: str
    names: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    def variable(self, name: str) -> int:
        self.names.append(name)
        return len(self.names) - 1

    def later(self, earlier: int, later: int, *why: object, gap: int = 1) -> None:
        """``later`` is at least ``gap`` after ``earlier``."""
        self.facts.append(Fact(earlier, later, gap, why))

    def exactly(self, earlier: int, later: int, gap: int, *why: object) -> None:
        """``later`` is ``gap`` after ``earlier``, no more and no less."""
        self.later(earlier, later, *why, gap=gap)
        self.later(later, earlier, *why, gap=-gap)


class Contradiction(NamedTuple):
    """A smallest set of facts that together are impossible, each leading to the next and the last to the first."""

    core: tuple[Fact, ...]


def decide(problem: Problem, timeout_s: float | None = None) -> Contradiction | Unknown | None:
    """``None`` where the facts can all hold, else why they cannot; ``Unknown`` where Z3 gives up."""
    named = _check(problem.names, problem.facts, timeout_s)
    if named is None or isinstance(named, Unknown):
        return named
    return Contradiction(minimal(problem.names, [problem.facts[index] for index in named]))


def minimal(names: list[str], core: list[Fact]) -> tuple[Fact, ...]:
    """A core without superfluous facts.

    A smallest contradiction of differences is one circle of facts whose gaps add up to more than 0.  Where Z3's core
    is not one circle yet, facts are left out as long as the rest is still impossible.
    """
    kept = list(core)
    for fact in core:
        if (circle := as_circle(kept)) is not None:
            return circle
        without = [other for other in kept if other is not fact]
        smaller = _check(names, without, None)
        if isinstance(smaller, list):
            kept = [without[index] for index in smaller]
    circle = as_circle(kept)
    assert circle is not None, kept
    return circle


def as_circle(facts: list[Fact]) -> tuple[Fact, ...] | None:
    """The facts in the order in which each leads to the next, if they are one circle that cannot be."""
    leaving = {fact.earlier: fact for fact in facts}
    if len(leaving) != len(facts) or sum(fact.gap for fact in facts) <= 0:
        return None
    circle = [facts[0]]
    while circle[-1].later != facts[0].earlier:
        following = leaving.get(circle[-1].later)
        if following is None or len(circle) == len(facts):
            return None
        circle.append(following)
    return tuple(circle) if len(circle) == len(facts) else None


def joined(circle: tuple[Fact, ...]) -> tuple[Fact, ...]:
    """The circle with neighbouring links of a chain made one, so that it is told in as few lines as it has turns."""
    turn = next((index for index, fact in enumerate(circle) if not isinstance(fact.why[0], Link)), 0)
    told: list[Fact] = []
    for fact in circle[turn:] + circle[:turn]:
        last = told[-1] if told else None
        if last is not None and _links(last, fact):
            told[-1] = Fact(last.earlier, fact.later, last.gap + fact.gap, (*last.why[:-1], fact.why[-1]))
        else:
            told.append(fact)
    return tuple(told)


def _links(one: Fact, other: Fact) -> bool:
    return isinstance(one.why[0], Link) and one.why[:-2] == other.why[:-2] and one.why[-1] == other.why[-2]


def _check(names: list[str], facts: list[Fact], timeout_s: float | None) -> list[int] | Unknown | None:
    """The numbers of facts that contradict each other, ``None`` if none do."""
    context = z3.Context()
    solver = z3.SimpleSolver(ctx=context)
    solver.set("arith.solver", 1)
    if timeout_s is not None:
        solver.set("timeout", max(1, int(1000 * timeout_s)))
    # One text for Z3's own parser: making each term from Python costs more than solving.
    lines = [f"(declare-const {_variable(number)} Int)" for number in range(len(names))]
    lines += [f"(declare-const f{n} Bool)(assert (=> f{n} {_formula(fact)}))" for n, fact in enumerate(facts)]
    solver.from_string("\n".join(lines))
    guards = _guards(context, len(facts))
    outcome = z3core.Z3_solver_check_assumptions(context.ref(), solver.solver, len(facts), guards)
    if outcome == z3.Z3_L_TRUE:
        return None
    if outcome == z3.Z3_L_UNDEF:
        return Unknown(f"Z3 gave up: {solver.reason_unknown()}")
    return sorted(int(str(name)[1:]) for name in solver.unsat_core())


def _guards(context: z3.Context, count: int) -> object:
    """The constants f0, f1, ... as the array that Z3's C interface takes; the context frees them with itself."""
    boolean = z3.BoolSort(context).ast
    guards = (z3core.Ast * max(count, 1))()
    for number in range(count):
        symbol = z3core.Z3_mk_string_symbol(context.ref(), f"f{number}")
        guards[number] = z3core.Z3_mk_const(context.ref(), symbol, boolean)
        z3core.Z3_inc_ref(context.ref(), guards[number])
    return guards


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


def _formula(fact: Fact) -> str:
    return f"(>= (- {_variable(fact.later)} {_variable(fact.earlier)}) {_integer(fact.gap)})"


def _variable(number: int) -> str:
    return f"t{number}"


def _integer(value: int) -> str:
    return str(value) if value >= 0 else f"(- {-value})"
