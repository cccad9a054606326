"""All theorems: the claim of each in words, the theorems that it relies on, and its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import NamedTuple

from dualpipe.errors import RuleError
from dualpipe.progress import Progress, silent
from dualpipe.schedule.generate import LateW
from proofs import deadlock_search
from proofs.models import BLOCKING
from proofs.theorems.deadlock import Waiting, ends, waits
from proofs.theorems.family import Family
from proofs.theorems.finder import Timetable, Untimed, timetable
from proofs.theorems.instance import schedule_at
from proofs.theorems.lower_bound import lower_bound
from proofs.theorems.memory import live, memory
from proofs.theorems.messages import messages
from proofs.theorems.obligation import NOTHING, QUESTION_SECONDS, Discharge, Failure, Obligation, discharge
from proofs.theorems.one_lane import one_f_one_b, zb1p
from proofs.theorems.order import order
from proofs.theorems.result import Counterexample, TheoremResult, counterexample
from proofs.theorems.sample import Sample
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
    """

    claim: str
    obligations: Callable[[Family], Iterator[Obligation]]
    premises: tuple[str, ...] = ("totals",)


def _timed(family: Family, waiting: Waiting) -> Timetable:
    found = timetable(family, QUESTION_SECONDS, waiting)
    if isinstance(found, Untimed):
        raise RuleError("the theorem needs times for every compute", found.reason, "see its verdict")
    return found


def _deadlock(family: Family) -> Iterator[Obligation]:
    return waits(family, _timed(family, Waiting.BLOCKING).guess.times, Waiting.BLOCKING)


def _makespan(family: Family) -> Iterator[Obligation]:
    return ends(family, *_timed(family, Waiting.BLOCKING).guess)


def _makespan_at_use(family: Family) -> Iterator[Obligation]:
    guess = _timed(family, Waiting.AT_USE).guess
    return chain(waits(family, guess.times, Waiting.AT_USE), ends(family, *guess))


THEOREMS: Mapping[str, Theorem] = {
    "totals": Theorem(
        "no phase has a negative length; each microbatch has F, B and each message once, its W with its B or deferred",
        totals,
        premises=(),
    ),
    "messages": Theorem(
        "on every ordered pair of ranks the k-th send is what the k-th receive expects, and none is left over", messages
    ),
    "order": Theorem("on its rank every op runs after all that it needs there", order),
    "queue": Theorem(
        "each deferred W runs once, after its B, first in first out; none is taken from an empty queue",
        queue,
    ),
    "deadlock": Theorem(
        "every rank reaches its end, whatever the compute times are (blocking messages, hence any weaker ones)",
        _deadlock,
    ),
    "lower bound": Theorem(
        "if {way}, and a rank runs one op at a time, then with F, B and W of one unit each no schedule ends before "
        "{least}, in whatever order and with whatever memory",
        lower_bound,
        premises=(),
    ),
    "makespan": Theorem(
        "with F, B and W of one unit each and instant messages that block the step ends by {makespan}",
        _makespan,
        premises=("totals", "deadlock"),
    ),
    "makespan at use": Theorem(
        "with F, B and W of one unit each and instant messages, awaited by what needs them, the step ends by "
        "{makespan}",
        _makespan_at_use,
        premises=("totals", "messages", "order"),
    ),
    "live": Theorem("microbatches between F and the end of B: at most {live}", live),
    "memory": Theorem("live activations, deferred W included: at most {memory}", memory, premises=("totals", "queue")),
    "pending": Theorem("deferred W: at most {pending}", pending, premises=("totals", "queue")),
    "accumulation": Theorem(
        "at each stage and lane the W run in microbatch order", accumulation, premises=("totals", "queue")
    ),
}


TIMED: Mapping[str, Waiting] = {
    "deadlock": Waiting.BLOCKING,
    "makespan": Waiting.BLOCKING,
    "makespan at use": Waiting.AT_USE,
}
"""Theorems whose obligations are about times: a case that fails shows that the times are wrong, not the claim."""

OPTIMAL = ", which is optimal: no schedule with these assumptions is shorter"
"""What follows a makespan that is the lower bound."""


NOT_REACHED = ", not reached at the sampled sizes"
"""Added to a bound that may be larger than necessary."""


Prover = Callable[[Family, str, set[str], float], TheoremResult]
"""Proves one theorem as ``prove`` does."""


@cache
def families() -> tuple[Family, ...]:
    """The schedules for which there are theorems, the simplest first.

    Always the same objects, so that the times of each are found once.
    """
    late = [make(late_w=late_w) for make in (dualpipe, dualpipev) for late_w in LateW if late_w is not LateW.none]
    return one_f_one_b(), zb1p(), dualpipe(), dualpipev(), *late


def theorems_of(family: Family) -> tuple[str, ...]:
    """The names of a family's theorems, premises first; without ``pending`` if the family defers no W."""
    return tuple(name for name in THEOREMS if name != "pending" or family.bounds.pending is not None)


def prove_all(
    progress: Progress = silent,
    of: Iterable[Family] | None = None,
    timeout: float = QUESTION_SECONDS,
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


def statement(family: Family, name: str, bound: str = "") -> str:
    """The claim of a theorem about a family, in words; ``bound`` is that of the makespan, if one is found."""
    found = {"makespan": bound or "a bound that is affine in P and M", "least": family.in_words(family.bounds.least)}
    return f"for {family.sizes}, {THEOREMS[name].claim.format_map({**family.bounds.words, **found})}"


def prove(family: Family, name: str, proved: set[str], timeout: float = QUESTION_SECONDS) -> TheoremResult:
    """Prove one theorem of a family, given the names of those that are ``proved`` already.

    The theorems about times are proved by times that are found first.  If the finder meets a size with a wait
    cycle, the schedule is run at that size: if it really deadlocks, ``deadlock`` is refuted.  If it finds no times, the
    theorem is unknown.

    Raises ``TableError`` for a table that cannot be read for all sizes.
    """
    start = time.monotonic()
    missing = [premise for premise in THEOREMS[name].premises if premise not in proved]
    lacking = Unknown(f"rests on {' and '.join(missing)}, not proved") if missing else None
    if name in TIMED:
        found = _Found(NOTHING, lacking) if lacking else _by_times(family, name, timeout)
    else:
        found = _by_cases(family, name, lacking, timeout)
    is_optimal = "lower bound" in proved and found.bound == family.in_words(family.bounds.least)
    bound = family.in_words(family.bounds.least) if name == "lower bound" else found.bound
    return TheoremResult(
        name=f"{family.name}: {name}",
        statement=statement(family, name, bound) + OPTIMAL * is_optimal,
        obligations=found.done.obligations,
        non_vacuous=found.done.non_vacuous,
        seconds=time.monotonic() - start,
        verdict=found.verdict,
        counterexample=found.counterexample,
        bound=bound,
        optimal=is_optimal,
    )


class _Found(NamedTuple):
    done: Discharge
    verdict: Proved | Refuted | Unknown
    counterexample: Counterexample | None = None
    bound: str = ""


def _by_cases(family: Family, name: str, lacking: Unknown | None, timeout: float) -> _Found:
    done = discharge(THEOREMS[name].obligations(family), timeout)
    wrong, found = _wrong(family, done)
    if lacking:
        return _Found(done, lacking, found)
    if wrong:
        return _Found(done, Refuted(None, core=(wrong.obligation.name,)), found)
    if done.failures:
        return _Found(done, Unknown(f"the solver gave up on {done.failures[0].obligation.name}"))
    return _Found(done, Proved())


def _by_times(family: Family, name: str, timeout: float) -> _Found:
    times = timetable(family, timeout, TIMED[name])
    if isinstance(times, Untimed):
        if times.deadlocked is not None:
            return _stuck(family, times.deadlocked)
        return _Found(times.proof, Unknown(times.reason), _wrong(family, times.proof)[1])
    if name == "deadlock":
        return _Found(times.waits, Proved())
    bound = family.in_words(times.guess.bound) + ("" if times.reached else NOT_REACHED)
    rests_on_deadlock = "deadlock" in THEOREMS[name].premises
    return _Found(times.ends if rests_on_deadlock else times.waits.followed_by(times.ends), Proved(), bound=bound)


def _wrong(family: Family, done: Discharge) -> tuple[Failure, Counterexample] | tuple[None, None]:
    """The first failure that Z3 found a size for, and that size."""
    for failure in done.failures:
        if failure.values is not None:
            return failure, counterexample(failure, family.size_of(failure.values))
    return None, None


def _stuck(family: Family, one: Sample) -> _Found:
    """A size with a wait cycle: the schedule itself is run there."""
    assert one.cycle is not None
    size = one.ranks, one.microbatches
    found = Counterexample(str(one.cycle), f"a wait cycle of {len(one.cycle.places)}", *size, {}, ())
    stuck = deadlock_search.deadlock(schedule_at(family, *size), BLOCKING)
    if isinstance(stuck, Refuted):
        return _Found(NOTHING, stuck, found)
    return _Found(NOTHING, Unknown("a run of the schedule does not have this cycle"), found)
