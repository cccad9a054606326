"""What happens when a schedule runs: on the fake ranks, and on processes, against the oracle; one step each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dualpipe.schedule import Schedule
from reference.case import Case
from reference.fault import Deadlock, Misstep
from reference.launch import launch
from reference.oracle import StepTruth
from reference.production import run_rank
from reference.trace import differences
from reference.verify import judge, run_fake, run_oracle
from tests.production.cases import TINY

TIMEOUT = 2.5
"""Seconds after which a process calls a wait a hang; a whole run that does not hang takes less."""
_WHOLE_RUN = 40.0


class Ending(Enum):
    """How a run came out; processes cannot tell a hang from a refusal, since both end in an error."""

    EQUAL = "equal"
    DIFFERENT = "different"
    HUNG = "hung"
    REFUSED = "refused"
    FAILED = "failed"
    BROKEN = "broken"


@dataclass(frozen=True)
class Outcome:
    """How a run ended; ``what`` names the kinds of tensors that differ, or how the run broke."""

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
    except Exception as error:  # any other way to stop is a bug of the fake ranks, and told as one
        return Outcome(Ending.BROKEN, frozenset([f"{type(error).__name__}: {error}"]))
    return _compared({difference.what for difference in differences(schedule, truth(case), traces)})


def on_processes(schedule: Schedule, blocking: bool) -> Outcome:
    """One step on production ranks, each a process of its own."""
    case = Case(schedule, TINY, steps=1, blocking=blocking, timeout=TIMEOUT)
    ran = launch(schedule.ranks, lambda context: run_rank(case), _WHOLE_RUN, TIMEOUT + 1)
    if ran.failures:
        return Outcome(Ending.FAILED, frozenset(map(str, ran.failures[:1])))
    # this process goes on to fork, so the oracle computes in another one
    (true,) = launch(1, lambda context: run_oracle(case), backend=None).values()
    return _compared({difference.what for difference in judge(case, "processes", true, ran).differences})


def truth(case: Case) -> list[StepTruth]:
    """The oracle's result, which depends on the schedule only by how much there is to compute."""
    size = tuple(case.schedule.microbatches[lane] for lane in case.lanes), case.schedule.stages
    if size not in _truths:
        _truths[size] = run_oracle(case)
    return _truths[size]


_truths: dict[tuple[tuple[int, ...], int], list[StepTruth]] = {}


def _compared(what: set[str]) -> Outcome:
    return Outcome(Ending.DIFFERENT, frozenset(what)) if what else Outcome(Ending.EQUAL)
