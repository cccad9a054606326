"""Finds the times that the theorems ``deadlock``, ``makespan`` and ``makespan at use`` rest on.

    small sizes -> integer program -> guess -> Z3, for all sizes -> proved
         ^                                       |
         +----- the counterexample's size -------+

A start that is affine in the sizes and the iteration is linear in its coefficients at every fixed size.  So the waits
of a few sizes are linear constraints on whole coefficients, and an integer program finds the guess with the least
bound on the makespan.  A guess may be wrong: then Z3 cannot prove it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from math import prod
from typing import NamedTuple

import numpy as np

from dualpipe.schedule.generate import PLANS, SizeError
from dualpipe.schedule.phase_table import Affine
from proofs.theorems.deadlock import Waiting, ends, waits
from proofs.theorems.family import Family
from proofs.theorems.moment import Times
from proofs.theorems.obligation import NOTHING, Discharge, discharge
from proofs.theorems.sample import Compute, Sample, sample

ROUNDS = 6
"""The number of guesses before the finder gives up."""

_MOST = 10_000
"""Ranks times microbatches of the largest size that is sampled."""

_LARGEST = 40
"""The largest coefficient of a time; the coefficients for phase tables are far smaller."""

_SECONDS = 100.0
"""The time limit of one integer program, which takes a few seconds."""

_INFEASIBLE = 2
"""The status of an integer program that has no solution."""

_BOUND, _START = 1000.0, 0.01
"""Prices of one unit of time in the objective: the bound counts most, then early starts.

The earliest starts are those that also hold at larger sizes.
"""


class Guess(NamedTuple):
    """Times for the computes of a family, and a bound on all their ends in the symbols of the sizes."""

    times: Times
    bound: Affine


@dataclass(frozen=True)
class Timetable:
    """Times that are proved for all sizes, and the outcome of the obligations about the waits and about the ends.

    ``slack`` is how far the bound is above the makespan at the sampled sizes, each with its ranks and microbatches.
    """

    guess: Guess
    waits: Discharge
    ends: Discharge
    slack: Mapping[tuple[int, int], int]

    @property
    def reached(self) -> bool:
        """Whether the bound is the makespan at one of the sampled sizes."""
        return 0 in self.slack.values()


@dataclass(frozen=True)
class Untimed:
    """Why no times were found or proved.

    ``deadlocked`` is a size with a wait cycle, ``proof`` how the last guess failed.
    """

    reason: str
    deadlocked: Sample | None = None
    proof: Discharge = NOTHING


@lru_cache(maxsize=64)
def timetable(family: Family, timeout: float, waiting: Waiting = Waiting.BLOCKING) -> Timetable | Untimed:
    """Times for a family, proved for all sizes; ``timeout`` in seconds for each question to Z3."""
    samples: list[Sample] = []
    sizes = list(sampled_sizes(family))
    proof = NOTHING
    for _ in range(ROUNDS):
        for size in sizes:
            try:
                samples.append(sample(family, *size, waiting))
            except IndexError as error:
                return Untimed(f"the table has no schedule for {_size(*size)}: {error}")
            if samples[-1].cycle:
                return Untimed(f"{samples[-1].cycle} at {_size(*size)}", samples[-1])
        guess = fit(family, samples)
        if isinstance(guess, Untimed):
            return guess
        in_time = proof = discharge(waits(family, guess.times, waiting), timeout)
        if not proof.failures:
            proof = discharge(ends(family, *guess), timeout)
        if not proof.failures:
            return Timetable(guess, in_time, proof, {one[:2]: _slack(family, guess.bound, one) for one in samples})
        failure = proof.failures[0]
        if failure.values is None:
            return Untimed(f"the solver gave up on {failure.obligation.name}", proof=proof)
        sizes = [family.size_of(failure.values)]
        if prod(sizes[0]) > _MOST or sizes[0] in [one[:2] for one in samples]:
            break  # too large to expand, or already sampled: another round would not differ
    return Untimed(
        f"no affine times found; the guess after {len(samples)} sampled sizes fails",
        proof=proof,
    )


def sampled_sizes(family: Family) -> Iterator[tuple[int, int]]:
    """Where the finder begins: the five smallest numbers of ranks, each with three numbers of microbatches."""

    def possible(ranks: int, microbatches: int) -> bool:
        try:
            PLANS[family.name](ranks, microbatches, 0)
        except SizeError:
            return False
        return True

    with_ranks = (ranks for ranks in count(1) if any(possible(ranks, most) for most in range(1, 4 * ranks + 1)))
    for ranks in islice(with_ranks, 5):
        few = list(islice((microbatches for microbatches in count(1) if possible(ranks, microbatches)), 5))
        yield from ((ranks, microbatches) for microbatches in (few[0], few[1], few[4]))


def _size(ranks: int, microbatches: int) -> str:
    return f"{ranks} rank{'s' * (ranks != 1)} and {microbatches} microbatch{'es' * (microbatches != 1)}"


def _slack(family: Family, bound: Affine, one: Sample) -> int:
    assert one.makespan is not None
    return bound.at(_symbols_of_size(family, one)) - one.makespan


def _symbols_of_size(family: Family, one: Sample) -> dict[str, int]:
    """The symbols of the sizes at a sample."""
    found = {}
    for expression, value in zip(family.world, (one.ranks, one.microbatches), strict=True):
        ((name, factor),) = expression.terms.items()
        found[name] = value // factor
    return found


_Key = tuple[str, str, int]
"""A compute of every size: kind of rank, row, number in the row's body."""

_Row = dict[int, int]
"""A linear expression in the unknowns, by their numbers."""


class _Program:
    """The integer program of some samples: numbers for the unknowns, constraints and prices."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.numbers: dict[tuple[_Key | None, str], int] = {}
        self.constraints: dict[tuple[tuple[int, int], ...], int] = {}
        self.prices: dict[int, float] = {}
        seen: dict[_Key, dict[tuple[int, ...], None]] = {}
        for one in samples:
            for wait in one.waits:
                seen.setdefault(_key(wait.later), {})[tuple(_symbols(wait.later).values())] = None
        names = {_key(wait.later): list(_symbols(wait.later)) for one in samples for wait in one.waits}
        self.symbols = {key: _independent(names[key], list(values)) for key, values in seen.items()}

    def start(self, compute: Compute) -> _Row:
        """The start of a compute."""
        key, values = _key(compute), _symbols(compute)
        return self.expression(key, {name: values[name] for name in self.symbols[key]})

    def expression(self, key: _Key | None, values: Mapping[str, int]) -> _Row:
        return {
            self.numbers.setdefault((key, name), len(self.numbers)): value for name, value in values.items() if value
        }

    def at_least(self, left: _Row, right: _Row, distance: int) -> None:
        """``left - right >= distance``."""
        row = dict(left)
        for number, value in right.items():
            row[number] = row.get(number, 0) - value
        terms = tuple(sorted((number, value) for number, value in row.items() if value))
        self.constraints[terms] = max(self.constraints.get(terms, distance), distance)

    def price(self, row: _Row, each: float) -> None:
        for number, value in row.items():
            self.prices[number] = self.prices.get(number, 0.0) + each * value

    def solve(self) -> list[int] | str:
        """The unknowns of least price, or why there are none."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # here, since it takes a while to load
        from scipy.sparse import coo_array

        width = len(self.numbers)
        entries = [(row, n, v) for row, terms in enumerate(self.constraints) for n, v in terms]
        rows, columns, values = zip(*entries, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(self.constraints), width)).tocsr()
        found = milp(
            np.array([self.prices.get(number, 0.0) for number in range(width)]),
            constraints=LinearConstraint(matrix, np.array(list(self.constraints.values()), dtype=float), np.inf),
            integrality=np.ones(width),
            bounds=Bounds(-_LARGEST, _LARGEST),
            options={"time_limit": _SECONDS},
        )
        if found.status == 0:
            return [round(value) for value in found.x]
        return "none fit" if found.status == _INFEASIBLE else f"the integer program gave up: {found.message}"


def fit(family: Family, samples: Sequence[Sample]) -> Guess | Untimed:
    """The times of least bound that fit every wait of the samples."""
    program = _Program(samples)
    for one in samples:
        bound = program.expression(None, _symbols_of_size(family, one) | {"": 1})
        program.price(bound, _BOUND)
        for wait in one.waits:
            earlier = program.start(wait.earlier) if wait.earlier else {}
            program.at_least(program.start(wait.later), earlier, wait.earlier.duration if wait.earlier else 0)
        for compute in dict.fromkeys(wait.later for wait in one.waits):
            program.price(program.start(compute), _START)
        for end in one.ends:
            program.at_least(bound, program.start(end), 0)
    solution = program.solve()
    if isinstance(solution, str):
        return Untimed(
            f"no affine times for {len(samples)} sizes up to {_size(*max(one[:2] for one in samples))}: {solution}"
        )
    forms: dict[_Key | None, dict[str, int]] = {}
    for (key, name), number in program.numbers.items():
        forms.setdefault(key, {})[name] = solution[number]
    affine = {key: Affine({n: c for n, c in form.items() if n and c}, form.get("", 0)) for key, form in forms.items()}
    return Guess({key: form for key, form in affine.items() if key}, affine[None])


def _key(compute: Compute) -> _Key:
    return compute.kind, compute.row, compute.number


def _symbols(compute: Compute) -> dict[str, int]:
    """The terms of a start: the symbols of the rank's kind, the iteration, and 1 under the empty name."""
    return {**dict(compute.values), "i": compute.iteration, "": 1}


def _independent(names: list[str], values: list[tuple[int, ...]]) -> list[str]:
    """The symbols without those that are a whole combination of others at all the sampled places.

    On a middle rank N is 2e + odd + 1, in a row that runs once i is 0.  With them the same times could be written in
    many ways, and most of these would fail at larger sizes.
    """
    table = np.array(values, dtype=float)
    kept = list(range(len(names)))
    for column in range(len(names) - 1):
        others = [other for other in kept if other != column]
        weights = np.round(np.linalg.lstsq(table[:, others], table[:, column], rcond=None)[0])
        if np.array_equal(table[:, others] @ weights, table[:, column]):
            kept = others
    return [names[column] for column in kept]
