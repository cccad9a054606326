"""Theorem ``lower bound``: how early the step of any schedule can end, in any order and with any memory.

The times are arbitrary real numbers, of which only these axioms are assumed (F, B and W take one unit each):

    enters    F at the first stage starts at time 0 or later
    forward   F at any other stage starts once F at the stage before it has ended
    backward  B starts once F of the same microbatch at the same stage has ended
    weights   W starts once B of the same microbatch at the same stage has ended
    serial    a rank runs one op at a time: its next op starts once the one before it has ended

By induction over the stages F at stage s starts at s or later.  So no op of a rank whose stages are d or more starts
before d.  By induction over its ops in the order in which they run, op number k starts at d + k or later.  The rank
runs F, B and W of every microbatch at each of its chunks.  The bound is that of the rank for which it is largest.
"""

from __future__ import annotations

from collections.abc import Iterator

from dualpipe.schedule.phase_table import Affine, affine, symbol
from proofs.theorems.constraint import TIME, TIME_AFTER, Constraint, Constraints, at_least, equal, substitute
from proofs.theorems.family import Family
from proofs.theorems.obligation import Obligation
from proofs.theorems.symbolic import Rank

AXIOMS = frozenset({"enters", "forward", "backward", "weights", "serial"})

_OPS = 3
"""F, B and W."""


def lower_bound(family: Family, axioms: frozenset[str] = AXIOMS) -> Iterator[Obligation]:
    """No schedule ends before the family's bound; ``axioms`` names those that are assumed."""
    for rank in family.deepest:
        most = substitute(family.bounds.least, rank.sizes)
        microbatches = len(family.chunks) * family.each
        yield from _Proof(rank, family.stages, microbatches, most, axioms).obligations()


class _Proof:
    """The proof for one rank.  ``begin`` is the time before which none of its ops starts."""

    def __init__(
        self, rank: Rank, stages: tuple[Affine, ...], microbatches: Affine, most: Affine, axioms: frozenset[str]
    ) -> None:
        self.rank, self.axioms, self.most, self.microbatches = rank, axioms, most, microbatches
        self.stages = [substitute(stage, rank.sizes) for stage in stages]
        self.ops = _OPS * microbatches
        self.begin = most - self.ops

    def obligations(self) -> Iterator[Obligation]:
        now, after = TIME, TIME_AFTER
        next_one = at_least(after, now + 1)
        stage, done = symbol("s"), symbol("k")
        yield self._case("F at stage 0", self._axiom("enters", at_least(now, 0)), at_least(now, 0))
        yield self._case(
            "F at stage s + 1, if F at stage s starts at s or later",
            (at_least(stage, 0), at_least(now, stage), *self._axiom("forward", next_one)),
            at_least(after, stage + 1),
        )
        for chunk, here in enumerate(self.stages):
            yield self._case(f"F of chunk {chunk}", (at_least(now, here),), at_least(now, self.begin))
        for name, axiom in (("B", "backward"), ("W", "weights")):
            begun = at_least(now, self.begin)
            yield self._case(name, (begun, *self._axiom(axiom, next_one)), at_least(after, self.begin))
        yield self._case(
            "the first op of the rank", (equal(done, 0), at_least(now, self.begin)), at_least(now, self.begin + done)
        )
        yield self._case(
            "op k + 1, if op k starts at the first one's time plus k or later",
            (at_least(done, 0), at_least(now, self.begin + done), *self._axiom("serial", next_one)),
            at_least(after, self.begin + done + 1),
        )
        each = [symbol(f"n{chunk}") for chunk in range(len(self.stages))]
        total = sum(each, affine(0))
        yield self._case(
            "the number of ops, however the microbatches are divided between the chunks",
            (*(at_least(count, 0) for count in each), equal(total, self.microbatches)),
            equal(_OPS * total, self.ops),
        )
        yield self._case(
            "the end of the last op",
            (equal(done, self.ops - 1), at_least(now, self.begin + done), next_one),
            at_least(after, self.most),
        )

    def _axiom(self, name: str, constraint: Constraint) -> Constraints:
        return (constraint,) if name in self.axioms else ()

    def _case(self, name: str, given: Constraints, then: Constraint) -> Obligation:
        return Obligation(self.rank, f"{name}, {self.rank.name}", given, (then,), ("earliest", name))
