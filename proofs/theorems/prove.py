"""All theorems: the claim of each in words, the theorems that it relies on, and its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from dualpipe.progress import Progress, silent
from proofs import deadlock_search
from proofs.models import BLOCKING
from proofs.theorems.deadlock import deadlock, makespan
from proofs.theorems.family import Family
from proofs.theorems.instance import schedule_at
from proofs.theorems.memory import live, memory
from proofs.theorems.messages import messages
from proofs.theorems.moment import UntimedError
from proofs.theorems.obligation import Discharge, Obligation, discharge
from proofs.theorems.one_lane import one_f_one_b, zb1p
from proofs.theorems.order import order
from proofs.theorems.result import TheoremResult, counterexample
from proofs.theorems.totals import totals
from proofs.theorems.two_way import dualpipe, dualpipev
from proofs.theorems.weights import accumulation, pending, queue
from proofs.verdict import Proved, Refuted, Unknown


@dataclass(frozen=True)
class Theorem:
    """A claim about every family.

    Parameters
    ----------
    claim:
        The claim in words; ``{live}`` and the like stand for a family's own bounds.
    obligations:
        The cases that together make up the claim.
    premises:
        Theorems that this one assumes.
    by_times:
        Whether the proof uses the family's times.  A case that fails then refutes the times, not the claim.
    """

    claim: str
    obligations: Callable[[Family], Iterator[Obligation]]
    premises: tuple[str, ...] = ("totals",)
    by_times: bool = False


THEOREMS: Mapping[str, Theorem] = {
    "totals": Theorem(
        "no phase is shorter than 0, each microbatch has F, B and each message once, and its W with its B or deferred",
        totals,
        premises=(),
    ),
    "messages": Theorem(
        "on every ordered pair of ranks the k-th send is the k-th receive's payload, and none is left over", messages
    ),
    "order": Theorem("on its rank every op comes after all that it needs there", order),
    "queue": Theorem(
        "each deferred W runs once, after its B, first in first out; none is taken from an empty queue",
        queue,
    ),
    "deadlock": Theorem(
        "every rank reaches its end, whatever the compute times are (blocking messages, hence any weaker ones)",
        deadlock,
        by_times=True,
    ),
    "makespan": Theorem(
        "with F, B and W of one unit each and instant messages the step ends by {makespan}",
        makespan,
        premises=("totals", "deadlock"),
        by_times=True,
    ),
    "live": Theorem("microbatches between F and the end of B: at most {live}", live),
    "memory": Theorem("live activations, deferred W included: at most {memory}", memory, premises=("totals", "queue")),
    "pending": Theorem("deferred W: at most {pending}", pending, premises=("totals", "queue")),
    "accumulation": Theorem(
        "at each stage and lane the W run in microbatch order", accumulation, premises=("totals", "queue")
    ),
}


Prover = Callable[[Family, str, set[str], float], TheoremResult]
"""Proves one theorem as ``prove`` does."""


def families() -> tuple[Family, ...]:
    """The schedules for which there are theorems, the simplest first."""
    return one_f_one_b(), zb1p(), dualpipe(), dualpipev()


def theorems_of(family: Family) -> tuple[str, ...]:
    """The names of a family's theorems, premises first; without ``pending`` if the family defers no W."""
    return tuple(name for name in THEOREMS if name != "pending" or family.bounds.pending is not None)


def prove_all(
    progress: Progress = silent,
    of: Iterable[Family] | None = None,
    timeout: float = 10.0,
    by: Prover | None = None,
) -> list[TheoremResult]:
    """Prove every theorem of every family for all sizes, with ``timeout`` seconds for each question to Z3.

    If the solver gives up, the theorem is ``Unknown``, never proved.  ``by`` proves one theorem; by default it is
    ``prove``, in this process and without a memory limit.
    """
    by = by or prove
    chosen = tuple(families() if of is None else of)
    results: list[TheoremResult] = []
    total = sum(len(theorems_of(family)) for family in chosen)
    for family in chosen:
        proved: set[str] = set()
        for name in theorems_of(family):
            progress(len(results), total, f"{family.name}: {name}")
            result = by(family, name, proved, timeout)
            if isinstance(result.verdict, Proved):
                proved.add(name)
            results.append(result)
    progress(total, total, "")
    return results


def statement(family: Family, name: str) -> str:
    """The claim of a theorem about a family, in words."""
    return f"for {family.sizes}, {THEOREMS[name].claim.format_map(family.bounds.words)}"


def prove(family: Family, name: str, proved: set[str], timeout: float = 10.0) -> TheoremResult:
    """Prove one theorem of a family, given the names of those that are ``proved`` already.

    If the times of the deadlock theorem do not fit at a size, the schedule is run at that size: if it deadlocks, the
    theorem is refuted, otherwise unknown.

    Raises ``TableError`` for a table that cannot be read for all sizes.
    """
    theorem = THEOREMS[name]
    start = time.monotonic()
    untimed = ""
    try:
        done = discharge(list(theorem.obligations(family)), timeout)
    except UntimedError as error:
        done, untimed = Discharge(0, 0, 0.0, ()), str(error)
    missing = [premise for premise in theorem.premises if premise not in proved]
    verdict = Unknown(untimed) if untimed else _verdict(theorem, done, missing)
    found = next((failure for failure in done.failures if failure.values is not None), None)
    if name == "deadlock" and found and {"totals", "queue"} <= proved:
        stuck = deadlock_search.deadlock(schedule_at(family, *family.world(found.values or {})), BLOCKING)
        verdict = stuck if isinstance(stuck, Refuted) else verdict
    return TheoremResult(
        name=f"{family.name}: {name}",
        statement=statement(family, name),
        obligations=done.obligations,
        non_vacuous=done.non_vacuous,
        seconds=time.monotonic() - start,
        verdict=verdict,
        counterexample=counterexample(found, family.world(found.values or {})) if found else None,
    )


def _verdict(theorem: Theorem, done: Discharge, missing: list[str]) -> Proved | Refuted | Unknown:
    given_up = [failure.obligation.name for failure in done.failures if failure.values is None]
    wrong = tuple(failure.obligation.name for failure in done.failures if failure.values is not None)
    if wrong and theorem.by_times:
        return Unknown("the times of the proof do not fit this table")
    if missing:
        return Unknown(f"rests on {' and '.join(missing)}, not proved")
    if wrong:
        return Refuted(None, core=wrong)
    if given_up:
        return Unknown(f"the solver gave up on {given_up[0]}")
    return Proved()
