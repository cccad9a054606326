"""A theorem's obligations at one size: the cases that arise, the ranks that they arise on, and their facts in numbers.

The coverage test compares these with the expanded schedule.  Everything is plain integers, without a solver.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import PLANS, Plan
from proofs.theorems.constraint import Constraint, Constraints
from proofs.theorems.family import Family
from proofs.theorems.obligation import Link, Obligation, evaluate
from proofs.theorems.symbolic import Rank


def plans_at(family: Family, ranks: int, microbatches: int) -> list[Plan]:
    """The plan of each rank before expansion, with the family's tables, which a test may have changed."""
    plans = [PLANS[family.name](ranks, microbatches, rank) for rank in range(ranks)]
    return [replace(plan, table=kind_of(family, plan).table) for plan in plans]


def schedule_at(family: Family, ranks: int, microbatches: int) -> Schedule:
    """The family's schedule at one size, expanded."""
    plans = plans_at(family, ranks, microbatches)
    return Schedule(plans[0].routes, tuple(plan.program() for plan in plans), family.name)


def kind_of(family: Family, plan: Plan) -> Rank:
    """The kind of rank of a plan; every plan has exactly one."""
    values = family.values(plan.sizes, "")
    (kind,) = [rank for rank in family.ranks if all(constraint.holds(values) for constraint in rank.domain)]
    return kind


class Instance(NamedTuple):
    """A case of an obligation at one size: its rank, or sender and receiver, and its fact in numbers."""

    ranks: tuple[int, ...]
    fact: tuple[str | int, ...]
    holds: bool
    obligation: Obligation


def instances(family: Family, obligations: Iterable[Obligation], ranks: int, microbatches: int) -> Iterator[Instance]:
    """Every case of every obligation that arises at this size."""
    plans = plans_at(family, ranks, microbatches)
    worlds: dict[int, list[World]] = {}
    for obligation in obligations:
        scope = obligation.scope
        if id(scope) not in worlds:
            worlds[id(scope)] = _worlds(family, scope, plans)
        for values, found in worlds[id(scope)]:
            for solution in solutions(obligation.given, values):
                fact = evaluate(obligation.fact, solution)
                holds = all(constraint.holds(solution) for constraint in obligation.then)
                yield from (Instance(ranks_of_case, fact, holds, obligation) for ranks_of_case in found)


class World(NamedTuple):
    """Values of a scope's symbols, and the ranks or pairs of neighbours that have them (mirror images share theirs)."""

    values: dict[str, int]
    ranks: list[tuple[int, ...]]


def _worlds(family: Family, scope: Rank | Link, plans: list[Plan]) -> list[World]:
    """The values and ranks that a scope covers at one size."""
    found: dict[tuple[int, ...], World] = {}
    sides = (scope,) if isinstance(scope, Rank) else (scope.sender, scope.receiver)
    everyone = [(rank,) for rank in range(len(plans))]
    candidates: Iterable[tuple[int, ...]] = everyone if isinstance(scope, Rank) else _neighbours(plans)
    for ranks in candidates:
        values: dict[str, int] = {}
        for side, rank in zip(sides, ranks, strict=True):
            values |= family.values(plans[rank].sizes, side.suffix)
        tables = all(plans[rank].table is side.table for side, rank in zip(sides, ranks, strict=True))
        if tables and all(constraint.holds(values) for constraint in scope.domain):
            found.setdefault(tuple(values.values()), World(values, [])).ranks.append(ranks)
    return list(found.values())


def _neighbours(plans: list[Plan]) -> list[tuple[int, ...]]:
    """Every ordered pair of ranks that are neighbours on a lane."""
    routes = plans[0].routes.values()
    steps = [step for route in routes for step in pairwise(route)]
    return sorted({pair for a, b in steps for pair in ((a, b), (b, a)) if a != b})


def solutions(given: Constraints, values: dict[str, int]) -> Iterator[dict[str, int]]:
    """All values of the remaining symbols that satisfy the constraints.

    Each symbol must be bounded on both sides by constraints on no other symbol, as the iterations of a row are.
    """
    ranges: dict[str, tuple[int, int]] = {}
    rest: list[Constraint] = []
    for constraint in given:
        free = [(name, c) for name, c in constraint.terms if name not in values]
        if len(free) > 1:
            rest.append(constraint)
            continue
        known = constraint.constant + sum(c * values[name] for name, c in constraint.terms if name in values)
        if not free:
            if known < 0 or (constraint.zero and known):
                return
            continue
        low, high = _interval(free[0][1], known, constraint.zero)
        name = free[0][0]
        now = ranges.get(name, (low, high))
        ranges[name] = (max(now[0], low), min(now[1], high))
    if any(low > high for low, high in ranges.values()):
        return
    if not ranges:
        assert not rest, "a symbol without bounds"
        yield values
        return
    name = min(ranges, key=lambda n: ranges[n][1] - ranges[n][0])
    low, high = ranges[name]
    assert high - low < UNBOUNDED, f"{name} has no bounds"
    others = [c for c in given if any(n not in values for n, _ in c.terms)]
    for value in range(low, high + 1):
        yield from solutions(tuple(others), values | {name: value})


UNBOUNDED = 10**6


def _interval(coefficient: int, known: int, zero: bool) -> tuple[int, int]:
    """The interval of x with ``coefficient * x + known >= 0`` (or ``= 0``), both ends included."""
    if zero:
        quotient, remainder = divmod(-known, coefficient)
        return (quotient, quotient) if not remainder else (1, 0)
    if coefficient > 0:
        return -(known // coefficient), UNBOUNDED
    return -UNBOUNDED, known // -coefficient
