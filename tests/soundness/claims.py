"""Claims that connect verdicts with runs; each is checked for one observed schedule.

The fake ranks run in two modes.  *Blocking*: a rank waits for every slot of messages, as in the model ``blocking``.
*Edge*: a rank posts its messages and continues, waits for a receive when a compute needs it, and for everything at its
end, as in the model ``edge``.  Processes run in these two modes over production's transport, and over a transport of
each other model (``tests.soundness.queues``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, assert_never

from dualpipe.schedule import B, Schedule, W
from proofs.models import MODELS, STREAM
from proofs.prove import Report, prove
from proofs.verdict import Proved, Refuted, Unknown
from tests.soundness.mutants import Mutant
from tests.soundness.runs import QUEUES, Ending, Outcome, on_fakes

MODES = {"blocking": True, "edge": False}
"""The runs of fake ranks, each named by its model, and whether it blocks."""
PROCESSES = {name: name for name in MODES} | {name: model.name for name, model in QUEUES.items()}
"""The runs on processes, each with the name of its model."""
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
    fakes: Mapping[str, Outcome]
    processes: Mapping[str, Outcome]

    def refuted(self, *checks: str) -> bool:
        return any(self.verdicts[check] == Refuted.word for check in checks)

    def proved(self, *checks: str) -> bool:
        return all(self.verdicts[check] == Proved.word for check in checks)

    @property
    def well_formed(self) -> bool:
        return self.proved("complete", "order", "messages")

    @property
    def refutes_only_accumulation(self) -> bool:
        return self.well_formed and self.proved("deadlock") and self.refuted("accumulation")


def observe(mutant: Mutant, prover: Prover = prove) -> Observation:
    """Prove and run one schedule on fake ranks.  Raises ``MethodsDisagreeError``."""
    schedule = mutant.schedule

    def verdicts(smt: bool) -> tuple[dict[str, str], Report]:
        report = prover(schedule, models=(*MODELS, STREAM), smt=smt)
        words = {name: result.verdict.word for name, result in report.checks.items()}
        words |= {f"deadlock, {name}": result.verdict.word for name, result in report.checks["deadlock"].models.items()}
        return words, report

    by_graph, _ = verdicts(smt=False)
    by_both, report = verdicts(smt=True)
    match report.checks["messages"].verdict:
        case Refuted(finding, _):
            repeats = finding is not None and finding.fault == "sent twice"
        case Proved() | Unknown():
            repeats = False
        case never:
            assert_never(never)
    fakes = {mode: on_fakes(schedule, blocking) for mode, blocking in MODES.items()}
    return Observation(mutant, by_both, by_graph, repeats, fakes, {})


class Claim(NamedTuple):
    """If ``applies`` is true of an observation, ``holds`` must be true."""

    text: str
    applies: Callable[[Observation], bool]
    holds: Callable[[Observation], bool]


def _both(holds: Callable[[Observation, str], bool]) -> Callable[[Observation], bool]:
    return lambda o: all(holds(o, mode) for mode in MODES)


def _never(*endings: Ending) -> Callable[[Observation], bool]:
    return _both(lambda o, mode: o.fakes[mode].ending not in endings)


def _always(*endings: Ending) -> Callable[[Observation], bool]:
    return _both(lambda o, mode: o.fakes[mode].ending in endings)


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
        _both(lambda o, mode: o.fakes[mode].ending is not Ending.HUNG or o.refuted(f"deadlock, {mode}")),
    ),
    Claim(
        "deadlock refuted: the run hangs, or is refused before it does",
        _any,
        _both(lambda o, mode: o.fakes[mode].ending in STOPS or o.proved(f"deadlock, {mode}")),
    ),
    Claim(
        "complete, order and messages proved: the run hangs exactly if deadlock is refuted",
        lambda o: o.well_formed,
        _both(lambda o, mode: (o.fakes[mode].ending is Ending.HUNG) == o.refuted(f"deadlock, {mode}")),
    ),
    Claim(
        "no deadlock when blocking: none in any model",
        lambda o: o.proved("deadlock, blocking"),
        lambda o: o.proved("deadlock", "deadlock, eager", "deadlock, edge"),
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
        "stream gives the verdict of blocking",
        _any,
        lambda o: o.verdicts["deadlock, stream"] == o.verdicts["deadlock, blocking"],
    ),
    Claim(
        "processes are equal exactly if fake ranks are and the model has no deadlock, except for repeated messages",
        lambda o: bool(o.processes) and not o.repeats,
        lambda o: all(
            (o.fakes["edge"].ending is Ending.EQUAL and o.proved(f"deadlock, {model}")) == (run.ending is Ending.EQUAL)
            for model, run in _ran(o)
        ),
    ),
    Claim(
        "processes fail exactly if their model has a deadlock, where complete, order and messages are proved",
        lambda o: bool(o.processes) and o.well_formed,
        lambda o: all((run.ending is Ending.FAILED) == o.refuted(f"deadlock, {model}") for model, run in _ran(o)),
    ),
    Claim(
        "processes fail if fake ranks hang or are refused, or their model has a deadlock",
        lambda o: bool(o.processes),
        lambda o: all(
            run.ending is Ending.FAILED
            for model, run in _ran(o)
            if o.fakes["edge"].ending in STOPS or o.refuted(f"deadlock, {model}")
        ),
    ),
)


def _runs(o: Observation) -> list[Outcome]:
    return list(o.fakes.values())


def _ran(o: Observation) -> list[tuple[str, Outcome]]:
    """The runs on processes with their models."""
    return [(PROCESSES[name], run) for name, run in o.processes.items()]


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
