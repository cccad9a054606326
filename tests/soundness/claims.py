"""Claims that connect verdicts with runs; each is checked for one observed schedule.

The fake ranks run in two modes.  *Blocking*: a rank waits for every slot of messages, as in the model ``blocking``.
*Not blocking*: a rank posts its messages and continues, waits for a receive when a compute needs it, and for everything
at its end.  No model of the prover is as lenient, but one is if the schedule is rewritten: sends are buffered without
limit, and receives are posted only where they are needed (``defer_receives``).  We call that the model ``ahead``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, assert_never

from dualpipe.schedule import MESSAGES, SENDS, B, Op, Schedule, Slot, W
from proofs.models import eager
from proofs.prove import Report, prove
from proofs.verdict import Proved, Refuted, Unknown
from tests.soundness.mutants import Mutant
from tests.soundness.runs import Ending, Outcome, on_fakes

AHEAD = "ahead"
MODES = {False: AHEAD, True: "blocking"}
"""The model of a run, by whether it blocks."""
Prover = Callable[..., Report]


@dataclass(frozen=True)
class Observation:
    """One schedule: its verdicts by check and by model, of plain search alone and of both methods, and its runs.

    ``repeats``: the only fault of its messages is one that is sent and received twice.
    """

    mutant: Mutant
    verdicts: Mapping[str, str]
    by_graph: Mapping[str, str]
    repeats: bool
    fakes: Mapping[bool, Outcome]
    processes: Mapping[bool, Outcome]

    def refuted(self, *checks: str) -> bool:
        return any(self.verdicts[check] == Refuted.word for check in checks)

    def proved(self, *checks: str) -> bool:
        return all(self.verdicts[check] == Proved.word for check in checks)

    def deadlock(self, blocking: bool) -> str:
        """The name of the deadlock check for such a run."""
        return f"deadlock, {MODES[blocking]}"

    @property
    def well_formed(self) -> bool:
        return self.proved("complete", "order", "messages")

    @property
    def refutes_only_accumulation(self) -> bool:
        return self.well_formed and self.proved("deadlock") and self.refuted("accumulation")


def observe(mutant: Mutant, prover: Prover = prove) -> Observation:
    """Prove and run one schedule on fake ranks.  Raises ``MethodsDisagreeError``."""
    schedule = mutant.schedule
    later, lenient = defer_receives(schedule), eager(max(1, sum(op.op.kind in MESSAGES for op in schedule)))

    def verdicts(smt: bool) -> tuple[dict[str, str], Report]:
        report = prover(schedule, smt=smt)
        ahead = prover(later, models=(lenient,), smt=smt).checks["deadlock"]
        words = {name: result.verdict.word for name, result in report.checks.items()}
        words |= {f"deadlock, {name}": result.verdict.word for name, result in report.checks["deadlock"].models.items()}
        return words | {f"deadlock, {AHEAD}": ahead.verdict.word}, report

    by_graph, _ = verdicts(smt=False)
    by_both, report = verdicts(smt=True)
    match report.checks["messages"].verdict:
        case Refuted(finding, _):
            repeats = finding is not None and finding.fault == "sent twice"
        case Proved() | Unknown():
            repeats = False
        case never:
            assert_never(never)
    fakes = {blocking: on_fakes(schedule, blocking) for blocking in MODES}
    return Observation(mutant, by_both, by_graph, repeats, fakes, {})


def defer_receives(schedule: Schedule) -> Schedule:
    """The schedule with every op in a separate slot, and each receive where its rank first waits for it.

    Before a receive that a compute waits for, the earlier ones from the same rank are received: their sends were posted
    earlier, so this adds no wait.  Receives that no compute waits for are posted at the end in one slot.
    """
    programs = tuple(tuple(_deferred(schedule, rank)) for rank in range(schedule.ranks))
    return Schedule(schedule.routes, programs, schedule.name)


def _deferred(schedule: Schedule, rank: int) -> Iterator[Slot]:
    waiting: defaultdict[int | None, list[Op]] = defaultdict(list)
    received: set[Op] = set()
    for op in (op for slot in schedule.programs[rank] for op in slot):
        if op.kind in MESSAGES and op.kind not in SENDS:
            waiting[schedule.peer(op)].append(op)
            continue
        for need in schedule.needs(op) if op.kind not in MESSAGES else ():
            for row in waiting.values():
                bare = [other.bare for other in row]
                if need in bare and need not in received:
                    first, row[:] = row[: bare.index(need) + 1], row[bare.index(need) + 1 :]
                    received |= {other.bare for other in first}
                    yield from ((other,) for other in first)
        yield (op,)
    rest = tuple(op for row in waiting.values() for op in row)
    if rest:
        yield rest


class Claim(NamedTuple):
    """If ``applies`` is true of an observation, ``holds`` must be true."""

    text: str
    applies: Callable[[Observation], bool]
    holds: Callable[[Observation], bool]


def _both(holds: Callable[[Observation, bool], bool]) -> Callable[[Observation], bool]:
    return lambda o: all(holds(o, blocking) for blocking in MODES)


def _never(*endings: Ending) -> Callable[[Observation], bool]:
    return _both(lambda o, blocking: o.fakes[blocking].ending not in endings)


def _always(*endings: Ending) -> Callable[[Observation], bool]:
    return _both(lambda o, blocking: o.fakes[blocking].ending in endings)


def _any(o: Observation) -> bool:
    return True


CHECKS = ("complete", "order", "messages", "deadlock", "accumulation")
STOPS = (Ending.HUNG, Ending.REFUSED)
"""The endings before the end of the program."""

CLAIMS = (
    Claim("all checks but memory proved: equal, blocking or not", lambda o: o.proved(*CHECKS), _always(Ending.EQUAL)),
    Claim(
        "a run that does not finish hangs or is refused, and never raises another error", _any, _never(Ending.BROKEN)
    ),
    Claim("plain search alone gives the verdicts of both methods", _any, lambda o: o.by_graph == o.verdicts),
    Claim(
        "the run hangs: deadlock is refuted",
        _any,
        _both(lambda o, b: o.fakes[b].ending is not Ending.HUNG or o.refuted(o.deadlock(b))),
    ),
    Claim(
        "deadlock refuted: the run hangs, or is refused before it does",
        _any,
        _both(lambda o, b: o.fakes[b].ending in STOPS or o.proved(o.deadlock(b))),
    ),
    Claim(
        "complete, order and messages proved: the run hangs exactly if deadlock is refuted",
        lambda o: o.well_formed,
        _both(lambda o, b: (o.fakes[b].ending is Ending.HUNG) == o.refuted(o.deadlock(b))),
    ),
    Claim(
        "no deadlock when blocking: none in any model",
        lambda o: o.proved("deadlock, blocking"),
        lambda o: o.proved("deadlock", "deadlock, eager", "deadlock, stream", f"deadlock, {AHEAD}"),
    ),
    Claim("order refuted: the run hangs or is refused", lambda o: o.refuted("order"), _always(*STOPS)),
    Claim("complete refuted: never equal", lambda o: o.refuted("complete"), _never(Ending.EQUAL)),
    Claim(
        "messages refuted, not only by a repetition: never equal",
        lambda o: o.refuted("messages") and not o.repeats,
        _never(Ending.EQUAL),
    ),
    Claim(
        "a run is refused only if complete, order or messages is refuted",
        lambda o: o.well_formed,
        _never(Ending.REFUSED),
    ),
    Claim(
        "complete, order, messages, accumulation proved: never different",
        lambda o: o.well_formed and o.proved("accumulation"),
        _never(Ending.DIFFERENT),
    ),
    Claim(
        "only accumulation refuted: every loss is right",
        lambda o: o.refutes_only_accumulation,
        lambda o: all(run.ending in (Ending.EQUAL, Ending.DIFFERENT) and "loss" not in run.what for run in _runs(o)),
    ),
    Claim(
        "only accumulation refuted: equal exactly if no addends but the first two of a sum are swapped",
        lambda o: o.refutes_only_accumulation,
        lambda o: all((run.ending is Ending.EQUAL) == commutes(o.mutant.schedule) for run in _runs(o)),
    ),
    Claim(
        "processes are equal exactly if fake ranks are, except for repeated messages",
        lambda o: bool(o.processes) and not o.repeats,
        lambda o: all((o.fakes[b].ending is Ending.EQUAL) == (run.ending is Ending.EQUAL) for b, run in _ran(o)),
    ),
    Claim(
        "processes fail if fake ranks hang or are refused",
        lambda o: bool(o.processes),
        lambda o: all(run.ending is Ending.FAILED for b, run in _ran(o) if o.fakes[b].ending in STOPS),
    ),
)


def _runs(o: Observation) -> list[Outcome]:
    return list(o.fakes.values())


def _ran(o: Observation) -> list[tuple[bool, Outcome]]:
    return list(o.processes.items())


def contradictions(observation: Observation) -> list[Claim]:
    """The claims that do not hold."""
    return [claim for claim in CLAIMS if claim.applies(observation) and not claim.holds(observation)]


def commutes(schedule: Schedule) -> bool:
    """Whether every sum over microbatches is in order, except for its first two addends: a + b is bitwise b + a."""
    rows: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
    for placed in schedule:
        if placed.op.kind in ADDING:
            rows[placed.rank, placed.op.kind, placed.op.lane, placed.op.stage].append(placed.op.mb)
    return all(sorted(row[:2]) + row[2:] == sorted(row) for row in rows.values())


ADDING = frozenset({B, W})
"""The computes that add to gradients: W to those of linear layers, B to all others."""
