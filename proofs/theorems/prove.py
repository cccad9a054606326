"""All theorems: what each says in plain words, what it rests on, and its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from proofs import deadlock_search as blocking_run
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
    """What is claimed of every family.

    Parameters
    ----------
    says:
        The claim; ``{live}`` and the like stand for a family's own bounds in words.
    obligations:
        The cases that together are the claim.
    rests_on:
        Theorems without which this one means nothing.
    by_times:
        Whether the proof goes through given times.  A case that fails then refutes the times, not the claim.
    """

    says: str
    obligations: Callable[[Family], Iterator[Obligation]]
    rests_on: tuple[str, ...] = ("totals",)
    by_times: bool = False


THEOREMS: Mapping[str, Theorem] = {
    "totals": Theorem(
        "no phase is shorter than 0, F, B and each message come once for each microbatch, and W with its B or put off",
        totals,
        rests_on=(),
    ),
    "messages": Theorem(
        "on every ordered pair of ranks the k-th send is the k-th receive's payload, and none is left over", messages
    ),
    "order": Theorem("on its rank every op comes after all that it needs there", order),
    "queue": Theorem(
        "each W that is put off is run once, after its B, first come first served; none is asked of an empty queue",
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
        rests_on=("totals", "deadlock"),
        by_times=True,
    ),
    "live": Theorem("microbatches between F and the end of B: at most {live}", live),
    "memory": Theorem("live activations, pending W counted: at most {memory}", memory, rests_on=("totals", "queue")),
    "pending": Theorem("W that wait: at most {pending}", pending, rests_on=("totals", "queue")),
    "accumulation": Theorem(
        "at each stage and lane the W run in microbatch order", accumulation, rests_on=("totals", "queue")
    ),
}


Progress = Callable[[int, int, str], None]
"""Called before each theorem with how many are done, how many there are, and the name of the next one."""


Prover = Callable[[Family, str, set[str], float], TheoremResult]


def families() -> tuple[Family, ...]:
    """The schedules for which there are theorems, the one that is easiest to read first."""
    return one_f_one_b(), zb1p(), dualpipe(), dualpipev()


def theorems_of(family: Family) -> tuple[str, ...]:
    """The names of a family's theorems, premises first.  Where no W is ever put off there is nothing to bound."""
    return tuple(name for name in THEOREMS if name != "pending" or family.bounds.pending is not None)


def prove_all(
    progress: Progress | None = None,
    of: Iterable[Family] | None = None,
    timeout: float = 10.0,
    by: Prover | None = None,
) -> list[TheoremResult]:
    """Prove every theorem of every family for all sizes; ``timeout`` in seconds for each question to Z3.

    A solver that gives up makes a theorem ``Unknown``, never proved.  ``by`` proves one theorem as ``prove`` does.  If
    it is not given that is ``prove`` itself: in this process, without a limit of memory.
    """
    by = by or prove
    chosen = tuple(families() if of is None else of)
    results: list[TheoremResult] = []
    total = sum(len(theorems_of(family)) for family in chosen)
    for family in chosen:
        proved: set[str] = set()
        for name in theorems_of(family):
            if progress:
                progress(len(results), total, f"{family.name}: {name}")
            result = by(family, name, proved, timeout)
            if isinstance(result.verdict, Proved):
                proved.add(name)
            results.append(result)
    return results


def statement(family: Family, name: str) -> str:
    """What a theorem says of a family, in words."""
    return f"for {family.sizes}, {THEOREMS[name].says.format_map(family.bounds.words)}"


def prove(family: Family, name: str, proved: set[str], timeout: float = 10.0) -> TheoremResult:
    """One theorem of a family, given the names of those that are ``proved`` already.

    Where the times of the deadlock theorem do not fit, the schedule is run at that size: if it really deadlocks the
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
    missing = [premise for premise in theorem.rests_on if premise not in proved]
    verdict = Unknown(untimed) if untimed else _verdict(theorem, done, missing)
    found = next((failure for failure in done.failures if failure.values is not None), None)
    if name == "deadlock" and found and {"totals", "queue"} <= proved:
        stuck = blocking_run.deadlock(schedule_at(family, *family.world(found.values or {})), BLOCKING)
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
