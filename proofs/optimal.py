"""The least makespan of a two-way pipeline within DualPipe's memory, with a proof from both sides.

The model is *relaxed*: it allows whatever DualPipe can do, and more.

- ``ranks`` ranks and two lanes; rank r holds stage r of the lane that goes up and stage ``ranks - 1 - r`` of the lane
  that goes down; half of the microbatches on each lane.
- F, B and W of a microbatch take one slot of time each; a rank runs one of them at a time, so overlap saves nothing.
- F comes after F of the previous stage, B after its own F and after B of the next stage, W after its own B.
- Messages take no time and no rank waits for a partner; F, B and W run in any order that these rules allow.
- A rank holds at most ``ranks + 1`` microbatches between F and the end of W, both lanes together; within a slot,
  allocations count before releases.

The proof is a timetable for T slots, and that none exists for T - 1.  A makespan that is impossible here is impossible
for every schedule of this kind; one that is possible here may still fail with real messages.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count

import z3

from dualpipe.errors import RuleError
from dualpipe.schedule import DOWN, UP, B, F, Op, W
from proofs.theorems.sample import sample
from proofs.theorems.two_way import dualpipe
from proofs.verdict import Proved, Unknown

Timetable = tuple[tuple[Op | None, ...], ...]
"""For each rank the op that it runs in each slot of time."""


class OptimalSizeError(RuleError):
    """A size that the model does not cover."""


SECONDS = 60.0
"""The default time limit of the whole search."""

MOST_BOOLEANS = 100_000
"""The most ops times slots of a question; a larger one would take longer to build than to answer."""


@dataclass(frozen=True)
class Optimum:
    """The least makespan of a size, in slots of time.

    Parameters
    ----------
    impossible:
        The largest number of slots that is proved to be too few; ``None`` if the solver gave up on the very first.
    least:
        The least number of slots that is enough, or ``None`` if the solver gave up before it was found.
    dualpipe:
        DualPipe's makespan at F = B = W = 1, or ``None`` for sizes that it does not support.
    timetable:
        A timetable with ``least`` slots.
    """

    ranks: int
    microbatches: int
    impossible: int | None
    least: int | None
    dualpipe: int | None
    timetable: Timetable
    seconds: float
    verdict: Proved | Unknown

    def as_json(self) -> dict[str, object]:
        rows = [" ".join(str(op or ".") for op in row) for row in self.timetable]
        return {
            "ranks": self.ranks,
            "microbatches": self.microbatches,
            "verdict": self.verdict.word,
            "impossible": self.impossible,
            "least": self.least,
            "dualpipe": self.dualpipe,
            "timetable": rows,
            "seconds": round(self.seconds, 3),
        }

    @property
    def text(self) -> str:
        size = f"{self.ranks} ranks, {self.microbatches} microbatches"
        theirs = "" if self.dualpipe is None else f"; DualPipe takes {self.dualpipe}"
        if isinstance(self.verdict, Unknown):
            known = "" if self.impossible is None else f"{self.impossible} slots are too few, and "
            return f"unknown: {size}: {known}{self.verdict.reason}{theirs}"
        if self.dualpipe == self.least:
            theirs += ", which is optimal"
        return f"proved: {size}: {self.least} slots are enough and {self.impossible} are not{theirs}"


def require_size(ranks: int, microbatches: int) -> None:
    """Raise ``OptimalSizeError`` for a size that the model does not cover."""
    if ranks < 2 or ranks % 2 or microbatches < 2 or microbatches % 2:
        raise OptimalSizeError(
            "two lanes that mirror each other need even numbers of ranks and microbatches, 2 or more",
            f"got {ranks} ranks and {microbatches} microbatches",
            f"use {max(ranks + ranks % 2, 2)} and {max(microbatches + microbatches % 2, 2)}",
        )


def optimal(ranks: int, microbatches: int, timeout_s: float = SECONDS) -> Optimum:
    """The least makespan for ``ranks`` (even) and ``microbatches`` in all (even).

    The search begins one slot below the work that each rank has.  ``timeout_s`` bounds all of it; when it ends early,
    and for sizes too large to write down, the verdict is ``Unknown``.
    Raises ``OptimalSizeError`` for a size that the model does not have.
    """
    require_size(ranks, microbatches)
    start = time.monotonic()
    result = partial(Optimum, ranks, microbatches, dualpipe=dualpipe_takes(ranks, microbatches))
    gave_up = partial(result, least=None, timetable=())
    impossible = None
    for slots in count(3 * microbatches - 1):
        if ranks * 3 * microbatches * slots > MOST_BOOLEANS:
            unknown = Unknown(f"the question for {slots} is too large for the solver")
            return gave_up(impossible=impossible, seconds=time.monotonic() - start, verdict=unknown)
        answer, timetable = _ask(ranks, microbatches, slots, timeout_s - (time.monotonic() - start))
        seconds = time.monotonic() - start
        if answer == z3.sat:
            proved = Proved()
            return result(impossible=impossible, least=slots, timetable=timetable, seconds=seconds, verdict=proved)
        if answer == z3.unknown:
            unknown = Unknown(f"the solver gave up on {slots}")
            return gave_up(impossible=impossible, seconds=seconds, verdict=unknown)
        impossible = slots
    raise AssertionError("unreachable")


def _ask(ranks: int, microbatches: int, slots: int, timeout_s: float) -> tuple[z3.CheckSatResult, Timetable]:
    """Whether ``slots`` are enough, with a timetable if they are."""
    deadline = time.monotonic() + timeout_s
    if timeout_s <= 0:
        return z3.unknown, ()
    problem = _Problem(ranks, microbatches, slots)
    answer = problem.solve(deadline - time.monotonic())
    if answer != z3.sat:
        return answer, ()
    timetable = problem.timetable()
    if faults := list(broken_rules(timetable, microbatches)):
        raise AssertionError(f"the solver's timetable breaks the rules: {faults[0]}")
    return answer, timetable


def dualpipe_takes(ranks: int, microbatches: int) -> int | None:
    """DualPipe's makespan in the same units, every compute as early as blocking messages allow."""
    return None if microbatches < 2 * ranks else sample(dualpipe(), ranks, microbatches).makespan


def ops_of(rank: int, ranks: int, microbatches: int) -> list[Op]:
    """Every F, B and W of one rank."""
    here = ((UP, rank), (DOWN, ranks - 1 - rank))
    return [Op(kind, lane, stage, mb) for kind in (F, B, W) for lane, stage in here for mb in range(microbatches // 2)]


def needs(op: Op, ranks: int) -> list[Op]:
    """The ops that must be done before ``op`` begins, on any rank, since messages take no time in this model."""
    kind, lane, stage, mb, _ = op
    if kind is F:
        return [Op(F, lane, stage - 1, mb)] if stage else []
    if kind is W:
        return [Op(B, lane, stage, mb)]
    return [Op(F, lane, stage, mb)] + ([Op(B, lane, stage + 1, mb)] if stage < ranks - 1 else [])


class _Problem:
    """The question to Z3 whether ``slots`` are enough.  A Boolean for each op and time says that it is done by then."""

    def __init__(self, ranks: int, microbatches: int, slots: int) -> None:
        self.ranks, self.microbatches, self.slots = ranks, microbatches, slots
        self.solver = z3.SolverFor("QF_FD")
        for rank in range(ranks):
            self._rank(ops_of(rank, ranks, microbatches))

    def done(self, op: Op, by: int) -> z3.BoolRef:
        return z3.BoolVal(by >= self.slots) if by <= 0 or by >= self.slots else z3.Bool(f"{op} done by {by}")

    def _rank(self, ops: list[Op]) -> None:
        for op in ops:
            first_of_lane = op.kind is F and op.stage == 0 and op.mb > 0
            # The microbatches of a lane are interchangeable, so they can be numbered in the order in which they enter.
            before = [op._replace(mb=op.mb - 1)] if first_of_lane else needs(op, self.ranks)
            for by in range(1, self.slots + 1):
                self.solver.add(z3.Implies(self.done(op, by - 1), self.done(op, by)))
                self.solver.add(*(z3.Implies(self.done(op, by), self.done(need, by - 1)) for need in before))
        allocates = [op for op in ops if op.kind is F]
        releases = [op for op in ops if op.kind is W]
        for now in range(self.slots):
            self.solver.add(z3.AtMost(*(self._runs(op, now) for op in ops), 1))
            # Implied by one op at a time; it lets the solver see at once that a rank has been idle too long.
            slots_left = self.slots - now
            if now > 0 and slots_left < len(ops):
                self.solver.add(z3.AtLeast(*(self.done(op, now) for op in ops), len(ops) - slots_left))
            held = [self.done(op, now + 1) for op in allocates] + [z3.Not(self.done(op, now)) for op in releases]
            self.solver.add(z3.AtMost(*held, self.ranks + 1 + len(releases)))

    def _runs(self, op: Op, now: int) -> z3.BoolRef:
        runs = z3.Bool(f"{op} runs in {now}")
        self.solver.add(runs == z3.And(self.done(op, now + 1), z3.Not(self.done(op, now))))
        return runs

    def solve(self, timeout_s: float) -> z3.CheckSatResult:
        self.solver.set("timeout", max(1, int(1000 * timeout_s)))
        return self.solver.check()

    def timetable(self) -> Timetable:
        model = self.solver.model()

        def row(rank: int) -> Iterator[Op | None]:
            ops = ops_of(rank, self.ranks, self.microbatches)
            for now in range(self.slots):
                yield next((op for op in ops if z3.is_true(model.eval(z3.Bool(f"{op} runs in {now}")))), None)

        return tuple(tuple(row(rank)) for rank in range(self.ranks))


def broken_rules(timetable: Timetable, microbatches: int) -> Iterator[str]:
    """The rules of the model that a timetable breaks, found without a solver."""
    ranks = len(timetable)
    done = {op: now + 1 for row in timetable for now, op in enumerate(row) if op}
    for rank, row in enumerate(timetable):
        ran = [op for op in row if op]
        if sorted(ran) != sorted(ops_of(rank, ranks, microbatches)):
            yield f"rank {rank} does not run each F, B and W of its stages once"
        held = 0
        for now, op in enumerate(row):
            if op is None:
                continue
            late = [need for need in needs(op, ranks) if done.get(need, now + 1) > now]
            yield from (f"rank {rank} runs {op} in slot {now}, before {need} has ended" for need in late)
            held += op.kind is F
            if held > ranks + 1:
                yield f"rank {rank} holds {held} microbatches in slot {now}"
            held -= op.kind is W
