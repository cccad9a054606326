"""The result of a theorem, as data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proofs.theorems.obligation import Failure, Link, Obligation, evaluate
from proofs.verdict import Proved, Refuted, Unknown


@dataclass(frozen=True)
class Counterexample:
    """One size, and one place at that size, where an obligation fails.

    ``symbols`` are the values of all symbols of the theorem, ``fact`` the constraint with its numbers.
    """

    obligation: str
    where: str
    ranks: int
    microbatches: int
    symbols: Mapping[str, int]
    fact: tuple[str | int, ...]

    def as_json(self) -> dict[str, object]:
        return {
            "obligation": self.obligation,
            "where": self.where,
            "ranks": self.ranks,
            "microbatches": self.microbatches,
            "symbols": dict(self.symbols),
            "fact": list(self.fact),
        }

    def __str__(self) -> str:
        symbols = ", ".join(f"{name}={value}" for name, value in self.symbols.items())
        size = f"{self.ranks} ranks and {self.microbatches} microbatches" + (f" ({symbols})" if symbols else "")
        return f"at {size}, {self.where}: {self.obligation}"


@dataclass(frozen=True)
class TheoremResult:
    """A theorem and its verdict.

    ``bound`` is the makespan that is proved as an upper or lower bound, in ranks P and microbatches M; empty for
    theorems that prove no makespan.  ``optimal`` says whether the upper bound equals the lower bound.  ``obligations``
    counts all cases, ``non_vacuous`` those that arise at some size.  If the verdict is ``Refuted``, the statement is
    false at the size of ``counterexample``.  An ``Unknown`` may have a counterexample too: there the proof fails,
    because a time does not fit, but the statement may still hold.
    """

    name: str
    statement: str
    obligations: int
    non_vacuous: int
    seconds: float
    verdict: Proved | Refuted | Unknown
    counterexample: Counterexample | None = None
    bound: str = ""
    optimal: bool = False

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "statement": self.statement,
            "obligations": self.obligations,
            "non_vacuous": self.non_vacuous,
            "seconds": round(self.seconds, 3),
            "verdict": self.verdict.word,
            "reason": self.reason,
            "counterexample": self.counterexample and self.counterexample.as_json(),
            "bound": self.bound or None,
            "optimal": self.optimal,
        }

    @property
    def reason(self) -> str:
        """Why the verdict is not ``proved``; empty if it is."""
        example = str(self.counterexample or "")
        if isinstance(self.verdict, Unknown):
            return f"{self.verdict.reason}: {example}" if example else self.verdict.reason
        return example

    @property
    def text(self) -> str:
        """One line, and a second one with the reason if it is not proved."""
        counts = f"{self.obligations} obligations, {self.non_vacuous} of them arise, {self.seconds:.1f} s"
        line = f"{self.verdict.word}: {self.name}: {self.statement} ({counts})"
        return line if not self.reason else f"{line}\n    {self.reason}"


def counterexample(failure: Failure, world: tuple[int, int]) -> Counterexample:
    """The failure as data; ``world`` is the size in ranks and microbatches."""
    obligation, values = failure
    assert values is not None
    return Counterexample(obligation.name, scope_name(obligation), *world, values, evaluate(obligation.fact, values))


def scope_name(obligation: Obligation) -> str:
    scope = obligation.scope
    return f"link {scope.name}" if isinstance(scope, Link) else f"rank kind {scope.kind}"
