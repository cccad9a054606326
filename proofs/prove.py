"""The checks of one schedule, each by two methods.

Plain search and Z3 share nothing but the schedule value.  If both decide and differ, the run crashes with both
answers.  If Z3 gives up, a proof by plain search alone is reported as unknown, but a refutation counts, since its
finding can be looked up.  So Z3 checks a refutation only where that is cheap: in a schedule of at most
``SECOND_OPINION`` ops and stages.  Z3 does not check a schedule of more than ``MOST_FOR_Z3`` at all, unless the caller
gives a time limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

from dualpipe.progress import Progress, silent
from dualpipe.schedule import Failure, Schedule
from proofs import buffers_search, buffers_smt, deadlock_search, deadlock_smt
from proofs import search as by_search
from proofs import smt as by_smt
from proofs.difference import Problem, smtlib_of
from proofs.doubts import doubts
from proofs.findings import Finding, LeftOver, Missing, Unmatched
from proofs.memory import bound_of, peak_activations, peak_bytes, within
from proofs.models import MODELS, Model
from proofs.prefix import smallest_prefix
from proofs.remarks import remarks
from proofs.report import Report, Result
from proofs.solver import SHARED, Solver
from proofs.table import table_of
from proofs.verdict import Proved, Refuted, Skipped, Unknown, Verdict
from proofs.waivers import WITHOUT, waived

__all__ = ["MethodsDisagreeError", "Report", "Result", "prove", "smtlib"]

CHECKS = ("complete", "order", "messages", "deadlock", "memory", "accumulation")
"""The checks of every schedule.  ``BUFFERS`` is one more, of schedules that were recorded."""
BUFFERS = "buffers"

SECOND_OPINION = 3_000
"""The most ops and stages of a schedule in which Z3 also checks a refutation by plain search, and adds its core."""

MOST_FOR_Z3 = 200_000
"""The most ops and stages that Z3 checks unless the caller gives a time limit: more take minutes and gigabytes."""


class MethodsDisagreeError(AssertionError):
    """The two methods answer differently, which is a bug in one of them.  Holds both answers."""

    def __init__(self, check: str, by_graph: Verdict, by_z3: Verdict) -> None:
        self.check, self.by_graph, self.by_z3 = check, by_graph, by_z3
        super().__init__(f"{check}: plain search says {by_graph}, Z3 says {by_z3}")


DisagreementError = MethodsDisagreeError
"""The earlier name.  The runtime's ``DisagreementError`` is about ranks that were set up differently."""


def prove(
    schedule: Schedule,
    models: Sequence[Model] = MODELS,
    max_activations: int | None = None,
    smt: bool = True,
    timeout_s: float | None = None,
    bytes_per_stage: tuple[Sequence[int], Sequence[int]] | None = None,
    label: str | None = None,
    begin: Progress = silent,
    solver: Solver = SHARED,
    waive: Collection[str] = (),
) -> Report:
    """Run the six checks of a schedule, and the seventh of a recorded one.  Any schedule value gives a report.

    Parameters
    ----------
    models:
        The models of communication for ``deadlock``, which is refuted if it is under any of them.
    max_activations:
        The bound of ``memory`` for every rank, instead of the published one for the schedule's name.
    smt:
        Whether Z3 checks as well; without it a proof rests on plain search alone.
    timeout_s:
        Seconds that Z3 may take for one question; by default ``solver.SECONDS``.  By default Z3 also does not check a
        schedule of more than ``MOST_FOR_Z3`` ops and stages, whose checks are then refuted or unknown.
    bytes_per_stage:
        The bytes that a microbatch holds at each stage while it waits for its B and for its W (``memory.peak_bytes``).
    label:
        The name of the schedule in the report, if not its own.
    begin:
        Called before each check and each model of ``deadlock`` with its name, and at the end.
    solver:
        The process that runs Z3, with its memory limit.
    waive:
        Checks that do not count for the verdict of the whole; they are made all the same.

    Raises
    ------
    MethodsDisagreeError
        If the two methods answer differently.
    BoundError
        For a negative bound or sizes that do not fit the stages.
    RuleError
        For a name in ``waive`` that is not a check.
    """
    without = waived(waive)
    bound = bound_of(schedule, max_activations)
    peaks_in_bytes = peak_bytes(schedule, *bytes_per_stage) if bytes_per_stage is not None else ()

    done, total = count(), len(CHECKS) - 1 + len(models) + bool(schedule.observed)
    if smt and (timeout_s is not None or _size(schedule) <= MOST_FOR_Z3):
        solver.start()

    def check(name: str, search: Callable[[], Verdict], problem: Callable[[], Problem] | None) -> Result:
        begin(next(done), total, name)
        return run_check(schedule, name, search, problem if smt else None, timeout_s, solver)

    def deadlock(model: Model) -> Result:
        search, problem = (partial(method.deadlock, schedule, model) for method in (deadlock_search, deadlock_smt))
        return check(f"deadlock, {model}", search, problem)

    bounded_memory = None if bound is None else partial(by_smt.memory, schedule, bound)
    checks = {
        "complete": check("complete", lambda: by_search.complete(schedule), lambda: by_smt.complete(schedule)),
        "order": check("order", lambda: by_search.order(schedule), lambda: by_smt.order(schedule)),
        "messages": check("messages", lambda: by_search.messages(schedule), lambda: by_smt.messages(schedule)),
        "deadlock": under_all({str(model): deadlock(model) for model in models}),
        "memory": check("memory", lambda: within(schedule, bound), bounded_memory),
        "accumulation": check(
            "accumulation", lambda: by_search.accumulation(schedule), lambda: by_smt.accumulation(schedule)
        ),
    }
    if schedule.observed:
        search, problem = partial(buffers_search.buffers, schedule), partial(buffers_smt.buffers, schedule)
        checks[BUFFERS] = check(BUFFERS, search, problem)
    checks = {name: after_failures(result, schedule.failures) for name, result in checks.items()}
    for name in without & checks.keys():
        if isinstance(checks[name].verdict, Refuted | Unknown):
            checks[name] = replace(checks[name], waived=WITHOUT[name])
    peaks = peak_activations(schedule)
    begin(total, total, "")
    name = schedule.name if label is None else label
    doubtful = tuple(doubts(schedule, {check: result.finding for check, result in checks.items()}))
    return Report(name, schedule.ranks, checks, peaks, peaks_in_bytes, schedule.failures, doubtful)


def after_failures(result: Result, failures: Sequence[Failure]) -> Result:
    """The result with the first failure that its refutation may follow from.

    Nothing follows from a failure after the recorded step.
    """
    finding = result.finding
    if finding is None or not finding.ends_early:
        return result
    within = (failure for failure in failures if failure.ends_early and not failure.is_later)
    possible = (failure for failure in within if not failure.is_hang or _follows_from_hang(finding, failure.rank))
    return replace(result, after=next(possible, None))


def _follows_from_hang(finding: Finding, rank: int) -> bool:
    """Whether a fault may follow from the hang of a rank: what is never run, or has no partner on that rank.

    A wait cycle is the hang itself and follows from nothing else.
    """
    if isinstance(finding, LeftOver | Unmatched) and finding.peer == rank:
        return not (isinstance(finding, Unmatched) and finding.circle)
    return isinstance(finding, Missing)


def run_check(
    schedule: Schedule,
    check: str,
    search: Callable[[], Verdict],
    problem: Callable[[], Problem] | None,
    timeout_s: float | None = None,
    solver: Solver = SHARED,
) -> Result:
    """Run one check by both methods, or by plain search alone without a problem for Z3."""
    started = time.perf_counter()
    by_graph = search()
    seconds = {"graph": time.perf_counter() - started}
    verdict = by_graph
    size = _size(schedule)
    if problem is not None and not (isinstance(by_graph, Refuted) and size > SECOND_OPINION):
        started = time.perf_counter()
        by_z3: Verdict
        if timeout_s is None and size > MOST_FOR_Z3:
            by_z3 = Unknown(
                f"Z3 skips schedules of more than {MOST_FOR_Z3:,} ops and stages, and this one has {size:,}: "
                "give a timeout for the solver (--solver-timeout) to let it try"
            )
        else:
            by_z3 = by_smt.verdict(problem(), timeout_s, solver)
        seconds["z3"] = time.perf_counter() - started
        verdict = settle(check, by_graph, by_z3)
    result = Result(verdict, seconds)
    if result.finding is None:
        return result
    prefix = smallest_prefix(schedule, result.finding)
    return replace(result, prefix=prefix, remarks=tuple(remarks(schedule, result.finding)))


def _size(schedule: Schedule) -> int:
    """The number of ops and stages, with which a problem for Z3 grows."""
    return table_of(schedule).size


def settle(check: str, by_graph: Verdict, by_z3: Verdict) -> Verdict:
    """Combine the verdicts of both methods.  Raises ``MethodsDisagreeError`` if they differ."""
    match by_graph, by_z3:
        case Refuted(), Unknown():
            return by_graph
        case _, Unknown():
            return by_z3
        case Refuted(finding, _), Refuted(_, core):
            return Refuted(finding, core)
        case Proved(), Proved():
            return by_graph
        case _:
            raise MethodsDisagreeError(check, by_graph, by_z3)


def under_all(results: Mapping[str, Result]) -> Result:
    """The first refutation in the order of the models, else the first unknown, else proved."""
    seconds: dict[str, float] = {}
    for result in results.values():
        for method, spent in result.seconds.items():
            seconds[method] = seconds.get(method, 0.0) + spent
    by_type: dict[type, Result] = {}
    for result in results.values():
        by_type.setdefault(type(result.verdict), result)
    if not by_type:
        return Result(Skipped("no model of communication was chosen"), seconds)
    worst = by_type.get(Refuted) or by_type.get(Unknown) or by_type[Proved]
    return Result(worst.verdict, seconds, worst.prefix, worst.remarks, results)


def smtlib(schedule: Schedule, model: Model, max_activations: int | None = None) -> str:
    """The obligations of all checks as SMT-LIB 2.6: one ``check-sat`` each, ``sat`` if the check holds.

    They are in the order of ``CHECKS``; ``memory`` is left out if there is no bound.
    """
    return smtlib_of(problems(schedule, model, max_activations))


def problems(schedule: Schedule, model: Model, max_activations: int | None = None) -> list[Problem]:
    """The obligations of all checks as Z3 gets them, in the order of ``CHECKS``."""
    bound = bound_of(schedule, max_activations)
    found = [by_smt.complete(schedule), by_smt.order(schedule), by_smt.messages(schedule)]
    found.append(deadlock_smt.deadlock(schedule, model))
    found += [by_smt.memory(schedule, bound)] if bound is not None else []
    found.append(by_smt.accumulation(schedule))
    return [*found, buffers_smt.buffers(schedule)] if schedule.observed else found
