"""The checks of one schedule, each by two methods, and the report.

Plain search and Z3 share nothing but the schedule value.  If both decide and differ, the run crashes with both
answers.  If Z3 gives up, a proof by plain search alone is reported as unknown, but a refutation counts, since its
finding can be looked up.  So Z3 checks a refutation only where that is cheap: in a schedule of at most
``SECOND_OPINION`` ops and stages.  Z3 does not check a schedule of more than ``MOST_FOR_Z3`` at all, unless the caller
gives a time limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, assert_never

from dualpipe.progress import Progress, silent
from dualpipe.schedule import Failure, Schedule
from proofs import buffers_search, buffers_smt, deadlock_search, deadlock_smt
from proofs import search as by_search
from proofs import smt as by_smt
from proofs.difference import Problem, smtlib_of
from proofs.findings import Finding, Missing
from proofs.memory import PeakBytes, bound_of, peak_activations, peak_bytes, within
from proofs.models import MODELS, Model
from proofs.prefix import Prefix, smallest_prefix
from proofs.remarks import remarks
from proofs.solver import SHARED, Solver
from proofs.story import live_lines, tell
from proofs.verdict import ExitCode, Proved, Refuted, Skipped, Unknown, Verdict, overall, worst
from proofs.waivers import WITHOUT, waived

__all__ = ["DisagreementError", "Report", "Result", "prove", "smtlib"]

CHECKS = ("complete", "order", "messages", "deadlock", "memory", "accumulation")
"""The checks of every schedule.  ``BUFFERS`` is one more, of schedules that were recorded."""
BUFFERS = "buffers"

SECOND_OPINION = 3_000
"""The most ops and stages of a schedule in which Z3 also checks a refutation by plain search, and adds its core."""

MOST_FOR_Z3 = 200_000
"""The most ops and stages that Z3 checks unless the caller gives a time limit: more take minutes and gigabytes."""


class DisagreementError(AssertionError):
    """The two methods answer differently, which is a bug in one of them.  Holds both answers."""

    def __init__(self, check: str, by_graph: Verdict, by_z3: Verdict) -> None:
        self.check, self.by_graph, self.by_z3 = check, by_graph, by_z3
        super().__init__(f"{check}: plain search says {by_graph}, Z3 says {by_z3}")


@dataclass(frozen=True)
class Result:
    """One check's verdict, the seconds that each method took, and, if it fails, the smallest prefix that fails.

    ``remarks`` are on the messages of the finding: where the recorded program posted them, and which names are guesses.
    For ``deadlock``, ``models`` has the result under each model of communication.  ``waived`` is empty, or what may be
    the case because the check fails and does not count for the verdict of the whole.  ``after`` is the failure of the
    recorded program that a refutation may follow from.
    """

    verdict: Verdict
    seconds: Mapping[str, float]
    prefix: Prefix | None = None
    remarks: tuple[str, ...] = ()
    models: Mapping[str, Result] = field(default_factory=dict)
    waived: str = ""
    after: Failure | None = None

    @property
    def finding(self) -> Finding | None:
        """What the check found, if it is refuted and more than the solver's core is known."""
        return self.verdict.finding if isinstance(self.verdict, Refuted) else None

    def story(self, finding: Finding) -> str:
        """The finding as text, with the remarks."""
        return "\n".join([tell(finding), *self.remarks])

    def as_json(self) -> dict[str, Any]:
        seconds = {method: round(spent, 4) for method, spent in self.seconds.items()}
        shown: dict[str, Any] = {
            "verdict": self.verdict.word,
            "seconds": round(sum(seconds.values()), 4),
            "methods": seconds,
        }
        match self.verdict:
            case Refuted(finding, core):
                if finding is not None:
                    shown |= {"story": self.story(finding), "finding": finding.as_json()}
                if core:
                    shown["core"] = list(core)
            case Unknown(reason) | Skipped(reason):
                shown["reason"] = reason
            case Proved():
                pass
            case _:
                assert_never(self.verdict)
        if self.waived:
            shown["waived"] = self.waived
        if self.after is not None:
            shown["may_follow_from"] = str(self.after)
        if self.prefix is not None:
            shown["prefix"] = list(self.prefix)
        if self.models:
            shown["models"] = {name: result.as_json() for name, result in self.models.items()}
        return shown


@dataclass(frozen=True)
class Report:
    """The results of all checks of a schedule.

    ``label`` names it; ``peaks_in_bytes`` is empty without sizes.  With ``failures``, those of a recorded program, the
    schedule is refuted whatever the checks find, since the program did not run through.
    """

    label: str
    ranks: int
    checks: Mapping[str, Result]
    peak_activations: tuple[int, ...]
    peaks_in_bytes: tuple[PeakBytes, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def exit_code(self) -> ExitCode:
        code = overall(result.verdict for result in self.checks.values() if not result.waived)
        return worst([code, ExitCode.REFUTED]) if self.failures else code

    @property
    def verdict(self) -> str:
        """``proved``, ``refuted`` or ``unknown``; of the checks that are not waived."""
        return self.exit_code.name.lower()

    @property
    def waived(self) -> tuple[str, ...]:
        """The checks that fail and are waived."""
        return tuple(name for name, result in self.checks.items() if result.waived)

    def as_json(self) -> dict[str, Any]:
        """The object that ``dualpipe prove --json`` prints."""
        shown: dict[str, Any] = {
            "schedule": self.label,
            "ranks": self.ranks,
            "verdict": self.verdict,
            "checks": {name: result.as_json() for name, result in self.checks.items()},
            "peak_activations": list(self.peak_activations),
        }
        if self.waived:
            shown["waived"] = list(self.waived)
        if self.failures:
            shown["failures"] = [failure._asdict() for failure in self.failures]
        if self.peaks_in_bytes:
            shown["peak_bytes"] = [peak.as_json() for peak in self.peaks_in_bytes]
        return shown

    def text(self) -> str:
        """The report for a terminal: the failures, a line for each check with its story below, then the peaks."""
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        but = f" but for {' and '.join(self.waived)} (waived)" if self.waived else ""
        lines = [*map(str, self.failures), f"{self.label or 'schedule'} on {ranks}: {self.verdict}{but}"]
        for name, result in self.checks.items():
            spent = ", ".join(f"{method} {seconds:.2f} s" for method, seconds in result.seconds.items())
            lines.append(f"  {name:<13} {result.verdict.word:<8}  {spent}")
            lines += [f"      {line}" for line in describe(result)]
        lines.append(f"  peak activations by rank: {' '.join(map(str, self.peak_activations))}")
        for peak in self.peaks_in_bytes:
            when = "" if peak.slot is None else f" in slot {peak.slot}"
            lines.append(f"  rank {peak.rank} holds at most {peak.total} bytes{when}")
            lines += [f"    {line}" for line in live_lines(tuple(held.what for held in peak.held))]
        return "\n".join(lines) + "\n"


def describe(result: Result) -> list[str]:
    """The lines below a check in the report: the story and remarks, or the reason, and what a waiver leaves open."""
    return [*_found(result), *([f"waived: {result.waived}"] if result.waived else [])]


def _found(result: Result) -> list[str]:
    match result.verdict:
        case Unknown(reason) | Skipped(reason):
            return [reason]
        case Proved():
            return []
        case Refuted(finding, _):
            if finding is None:
                return []
            lines = result.story(finding).split("\n")
            if result.prefix is not None:
                counts = ", ".join(f"{count} of rank {rank}" for rank, count in enumerate(result.prefix) if count)
                lines.append(f"the first slots are enough to see it: {counts}")
            passed = [name for name, other in result.models.items() if isinstance(other.verdict, Proved)]
            if passed:
                lines.append(f"proved with {' and '.join(passed)} messages")
            if result.after is not None:
                what = "hang" if result.after.is_hang else "failure"
                lines.append(f"this may be a consequence of the {what}: rank {result.after.rank} ended early")
            return lines
        case _:
            assert_never(result.verdict)


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
    DisagreementError
        If the two methods answer differently.
    BoundError
        For a negative bound or sizes that do not fit the stages.
    RuleError
        For a name in ``waive`` that is no check.
    """
    without = waived(waive, CHECKS)
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
    for name in without:
        if isinstance(checks[name].verdict, Refuted | Unknown):
            checks[name] = replace(checks[name], waived=WITHOUT[name])
    checks = {name: after_failures(result, schedule.failures) for name, result in checks.items()}
    peaks = peak_activations(schedule)
    begin(total, total, "")
    name = schedule.name if label is None else label
    return Report(name, schedule.ranks, checks, peaks, peaks_in_bytes, schedule.failures)


def after_failures(result: Result, failures: Sequence[Failure]) -> Result:
    """The result with the first failure that its refutation may follow from.

    What a hang leaves unmatched is its cause and not its consequence; what the ranks never ran is its consequence.
    """
    finding = result.finding
    if finding is None or not finding.ends_early:
        return result
    possible = (failure for failure in failures if not failure.is_hang or isinstance(finding, Missing))
    return replace(result, after=next(possible, None))


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
    ops = sum(len(slot) for program in schedule.programs for slot in program)
    return ops + sum(map(len, schedule.routes.values()))


def settle(check: str, by_graph: Verdict, by_z3: Verdict) -> Verdict:
    """Combine the verdicts of both methods.  Raises ``DisagreementError`` if they differ."""
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
            raise DisagreementError(check, by_graph, by_z3)


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
