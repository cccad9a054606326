"""Obligations: each is one case of a theorem.  To discharge it, Z3 looks for a size at which the case fails."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import z3

from dualpipe.schedule.phase_table import Action, Affine
from proofs.theorems.constraint import Constraints, Values, formula, is_whole, variable
from proofs.theorems.symbolic import Rank

Fact = tuple[str | Affine, ...]


@dataclass(frozen=True)
class Link:
    """One kind of ordered pair of ranks that exchange messages.

    ``matches`` maps each send of ``sender`` to the receive of ``receiver`` that it should match; ``tie`` relates the
    symbols of the two ranks, as in r' = r + 1.
    """

    name: str
    sender: Rank
    receiver: Rank
    matches: Mapping[Action, Action]
    tie: Constraints

    @property
    def domain(self) -> Constraints:
        return self.sender.domain + self.receiver.domain + self.tie


class Obligation(NamedTuple):
    """``given`` implies ``then``, for all values of the symbols in the scope's domain.

    ``fact`` identifies the corresponding constraint of the expanded schedule, for the coverage test.
    """

    scope: Rank | Link
    name: str
    given: Constraints
    then: Constraints
    fact: Fact

    def holds(self, values: Values) -> bool:
        """Whether the implication holds at one size, in plain Python."""
        return not self.arises(values) or all(c.holds(values) for c in self.then)

    def arises(self, values: Values) -> bool:
        """Whether the case exists at one size, in plain Python."""
        return all(c.holds(values) for c in self.scope.domain + self.given)


def evaluate(fact: Fact, values: Values) -> tuple[str | int, ...]:
    """The fact at one size."""
    return tuple(part.at(values) if isinstance(part, Affine) else part for part in fact)


class Failure(NamedTuple):
    """An obligation that fails at a size, or (``values`` is ``None``) that Z3 gave up on."""

    obligation: Obligation
    values: dict[str, int] | None


class Discharge(NamedTuple):
    """The outcome of a theorem's obligations.  ``failures`` are in the order of the obligations."""

    obligations: int
    non_vacuous: int
    seconds: float
    failures: tuple[Failure, ...]

    def followed_by(self, other: Discharge) -> Discharge:
        """The outcome of both."""
        counts = (self.obligations + other.obligations, self.non_vacuous + other.non_vacuous)
        return Discharge(*counts, self.seconds + other.seconds, self.failures + other.failures)


NOTHING = Discharge(0, 0, 0.0, ())
"""The outcome without any obligation."""


QUESTION_SECONDS = 10.0
"""For each question to Z3, where nothing else is asked for."""


@cache
def is_possible(case: Constraints) -> bool:
    """Whether a case exists at some size, so that its obligations need to be written down at all.

    Where the solver gives up it may exist.
    """
    solver = z3.SimpleSolver()
    solver.set("timeout", int(1000 * QUESTION_SECONDS))
    solver.add(*map(formula, case))
    return bool(solver.check() != z3.unsat)


def discharge(obligations: Iterable[Obligation], timeout: float, enough: int = 1) -> Discharge:
    """Ask Z3 about each obligation, with at most ``timeout`` seconds for each question.

    Stops after ``enough`` failures.  If the solver gives up, that is a failure without values, never a success.
    """
    start = time.monotonic()
    count, arising = 0, 0
    failures: list[Failure] = []
    scope = None
    for obligation in obligations:
        if obligation.scope is not scope:
            scope = obligation.scope
            solver = z3.SimpleSolver()
            solver.set("timeout", int(1000 * timeout))
            solver.add(*map(formula, scope.domain))
        count += 1
        arises, failure = _ask(solver, obligation)
        arising += arises
        if failure:
            failures.append(failure)
            if len(failures) >= enough:
                break
    return Discharge(count, arising, time.monotonic() - start, tuple(failures))


def _ask(solver: z3.Solver, obligation: Obligation) -> tuple[bool, Failure | None]:
    """Whether the case arises at some size, and the failure if there is one."""
    solver.push()
    try:
        solver.add(*map(formula, obligation.given))
        arises = solver.check()
        if arises == z3.unsat:
            return False, None
        solver.add(z3.Not(z3.And(*map(formula, obligation.then))))
        wrong = solver.check()
        if wrong == z3.unsat:
            return True, None
        if wrong == z3.unknown:
            return True, Failure(obligation, None)
        model = _small_model(solver, obligation)
        return True, Failure(obligation, model and _values(model, obligation))
    finally:
        solver.pop()


def _small_model(solver: z3.Solver, obligation: Obligation) -> z3.ModelRef | None:
    """A model with small whole numbers, which a person can read, or at least with whole ones."""
    solver.add(*map(is_whole, _symbols(obligation)))
    if solver.check() != z3.sat:
        return None
    model = solver.model()
    for most in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
        solver.push()
        solver.add(*(variable(name) <= most for name in _symbols(obligation)))
        small = solver.check() == z3.sat
        model = solver.model() if small else model
        solver.pop()
        if small:
            break
    return model


def _symbols(obligation: Obligation) -> list[str]:
    constraints = obligation.scope.domain + obligation.given + obligation.then
    return sorted({name for constraint in constraints for name, _ in constraint.terms})


def _values(model: z3.ModelRef, obligation: Obligation) -> dict[str, int]:
    found = {name: model.eval(variable(name), model_completion=True) for name in _symbols(obligation)}
    values = {name: int(str(value)) for name, value in found.items()}
    if obligation.holds(values):
        raise AssertionError(f"Z3 and plain arithmetic disagree about {obligation.name} at {values}")
    return values
