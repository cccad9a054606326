"""Run one step of a schedule, on fake ranks or on processes, and compare it with the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dualpipe.runtime.transport import Transport
from dualpipe.schedule import Schedule
from dualpipe.testing.launch import launch
from proofs.models import EDGE, STREAM, Model, eager
from reference.case import Case
from reference.comparison import differences
from reference.fault import Deadlock, Misstep
from reference.oracle import StepTruth
from reference.production import run_rank, transport_of
from reference.verify import compare_outcome, run_fake, run_oracle
from tests.production.cases import TINY
from tests.soundness.queues import QueueTransport

TIMEOUT = 2.5
"""Seconds that a process waits for a message before it reports a hang; a whole run without a hang takes less."""
_WHOLE_RUN = 40.0


class Ending(Enum):
    """The outcome of a run.  On processes a hang and a refusal are both an error, ``FAILED``."""

    EQUAL = "equal"
    DIFFERENT = "different"
    HUNG = "hung"
    REFUSED = "refused"
    FAILED = "failed"
    BROKEN = "broken"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.  ``what``: the kinds of tensors that differ, or the error."""

    ending: Ending
    what: frozenset[str] = frozenset()


def on_fakes(schedule: Schedule, blocking: bool) -> Outcome:
    """One step on fake ranks, in this process."""
    case = Case(schedule, TINY, steps=1, blocking=blocking)
    try:
        traces = run_fake(case, lambda step: None)
    except Deadlock:
        return Outcome(Ending.HUNG)
    except Misstep:
        return Outcome(Ending.REFUSED)
    except Exception as error:  # any other error is a bug of the fake ranks
        return Outcome(Ending.BROKEN, frozenset([f"{type(error).__name__}: {error}"]))
    return _compared({difference.what for difference in differences(schedule, truth(case), traces)})


QUEUES: dict[str, Model] = {"eager on queues": eager(), "stream on a queue": STREAM, "edge on queues": EDGE}
"""Runs on processes over the transport of a model.  The other runs are over production's own transport."""


def on_processes(schedule: Schedule, run: str) -> Outcome:
    """Two steps on production ranks, each a process of its own: in the first step the first W is not deferred.

    ``run`` is one of ``QUEUES``, or over production's own transport ``blocking`` or ``edge``.
    """
    model = QUEUES.get(run)
    blocking = run == "blocking" if model is None else not model.overlaps
    case = Case(schedule, TINY, steps=2, blocking=blocking, timeout=TIMEOUT)

    def transport(case: Case) -> Transport:
        return transport_of(case) if model is None else QueueTransport(model, case.timeout)

    ran = launch(schedule.ranks, lambda context: run_rank(case, make_transport=transport), _WHOLE_RUN, TIMEOUT + 1)
    if ran.failures:
        return Outcome(Ending.FAILED, frozenset(map(str, ran.failures[:1])))
    # this process will fork again, so the oracle computes in another one
    (true,) = launch(1, lambda context: run_oracle(case), backend=None).values()
    return _compared({difference.what for difference in compare_outcome(case, "processes", true, ran).differences})


def truth(case: Case) -> list[StepTruth]:
    """The oracle's result, which depends on the schedule only by its numbers of stages and microbatches."""
    size = tuple(case.schedule.microbatches[lane] for lane in case.lanes), case.schedule.stages
    if size not in _truths:
        _truths[size] = run_oracle(case)
    return _truths[size]


_truths: dict[tuple[tuple[int, ...], int], list[StepTruth]] = {}


def _compared(what: set[str]) -> Outcome:
    return Outcome(Ending.DIFFERENT, frozenset(what)) if what else Outcome(Ending.EQUAL)
