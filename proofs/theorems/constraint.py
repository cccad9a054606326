"""Linear constraints, over integers but for points in time, in which all theorems are written.

A constraint is data: Z3 gets it for all sizes, and plain Python evaluates it for one size.  The coverage test and
every counterexample rely on the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import z3

from dualpipe.errors import RuleError
from dualpipe.schedule.phase_table import Affine, affine, symbol

Values = Mapping[str, int]

TIME, TIME_AFTER = symbol("t"), symbol("t'")
"""Points in time: any real numbers.  All other symbols are integers."""

_REAL = frozenset({*TIME.terms, *TIME_AFTER.terms})


class TableError(RuleError):
    """A phase table that cannot be read for all sizes at once."""


class Constraint(NamedTuple):
    """``sum of coefficient * symbol + constant`` is at least zero or, if ``zero``, exactly zero."""

    terms: tuple[tuple[str, int], ...]
    constant: int
    zero: bool

    def holds(self, values: Values) -> bool:
        total = sum(c * values[name] for name, c in self.terms) + self.constant
        return total == 0 if self.zero else total >= 0

    def __str__(self) -> str:
        return f"{Affine(dict(self.terms), self.constant)} {'=' if self.zero else '>='} 0"


Constraints = tuple[Constraint, ...]


def at_least(left: Affine | int, right: Affine | int) -> Constraint:
    """``left >= right``."""
    return _constraint(affine(left) - right, zero=False)


def below(left: Affine | int, right: Affine | int) -> Constraint:
    """``left < right``, over the integers."""
    return at_least(right, affine(left) + 1)


def equal(left: Affine | int, right: Affine | int) -> Constraint:
    """``left = right``."""
    return _constraint(affine(left) - right, zero=True)


NEVER = Constraint((), -1, zero=False)


def _constraint(difference: Affine, zero: bool) -> Constraint:
    difference = whole(difference)
    return Constraint(tuple(sorted((n, c) for n, c in difference.terms.items() if c)), difference.constant, zero)


def whole(value: Affine) -> Affine:
    """The same expression without its divisor.

    Raises
    ------
    TableError
        If the divisor does not divide every coefficient: then the value is not whole at every size.
    """
    numbers = (*value.terms.values(), value.constant)
    if any(number % value.divisor for number in numbers):
        raise TableError(
            "a repeat count must be whole at every size", f"got {value}", "round it with the parity symbol"
        )
    terms = {name: c // value.divisor for name, c in value.terms.items()}
    return Affine(terms, value.constant // value.divisor)


def substitute(value: Affine | int, sizes: Mapping[str, Affine]) -> Affine:
    """Replace the symbols of an expression; those that ``sizes`` lacks stay.  The result is whole."""
    value = affine(value)
    total = affine(value.constant)
    for name, coefficient in value.terms.items():
        total = total + coefficient * sizes.get(name, Affine({name: 1}))
    return whole(Affine(total.terms, total.constant, value.divisor))


def variable(name: str) -> z3.ArithRef:
    """A symbol for Z3."""
    return z3.Real(name) if name in _REAL else z3.Int(name)


def is_whole(name: str) -> z3.BoolRef:
    """That a symbol has an integer value, for Z3."""
    return z3.IsInt(z3.Real(name)) if name in _REAL else z3.BoolVal(True)


@cache
def formula(constraint: Constraint) -> z3.BoolRef:
    """The constraint for Z3, over free variables named as the symbols."""
    total = z3.Sum([c * variable(name) for name, c in constraint.terms]) + constraint.constant
    result: z3.BoolRef = total == 0 if constraint.zero else total >= 0
    return result
