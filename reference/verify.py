"""Verify one case: run the oracle, the fake ranks and the production processes, and compare them bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualpipe.errors import RuleError, UndecidedError
from dualpipe.progress import Progress, silent
from dualpipe.testing.launch import Context, Failure, Outcome, launch
from reference import fake
from reference.case import Case, make_deterministic
from reference.comparison import differences, failed_sanity_checks
from reference.oracle import StepTruth, train, weights_of
from reference.production import run_rank
from reference.report import Comparison, Report, StageSize, of_all_ranks
from reference.trace import StepTrace, merge

FAKE, PROCESSES = "fake ranks", "processes"
_SPARE, _PER_OP = 30.0, 0.1
"""Seconds for each step and for each of its ops, on top of the timeout of a wait, until the processes are killed."""

RankBody = Callable[[Case, Callable[[Any], None]], list[StepTrace]]


@dataclass(frozen=True)
class Traced(Comparison):
    """A comparison together with what the implementation recorded of each step."""

    traces: Sequence[StepTrace] = field(default=(), repr=False)


def verify(case: Case, on_progress: Progress = silent, rank_body: RankBody = run_rank) -> Report[Case, Traced]:
    """Run each implementation in processes of its own and compare it with the oracle.

    ``rank_body`` lets a test replace a production rank with a faulty one.

    Raises ``RuleError`` for a case that cannot run here, and ``UndecidedError`` if the oracle fails.
    """
    _check(case)
    started = time.monotonic()
    references = launch(
        2,
        lambda context: _run_reference(case, context),
        _time_limit(case),
        _time_limit(case),  # the two are independent: a failure of one does not end the other
        None,
        lambda rank, steps: on_progress(steps, case.steps, FAKE),
    )
    of_oracle, of_fake = references.results
    if isinstance(of_oracle, Failure):
        raise UndecidedError(f"the oracle failed, so nothing can be compared: {of_oracle.text}\n{of_oracle.trace}")
    truth, initial = of_oracle
    of_processes: Outcome[list[StepTrace]] = launch(
        case.schedule.ranks,
        lambda context: rank_body(case, context.progress),
        _time_limit(case),
        case.timeout + 5,
        "gloo",
        of_all_ranks(on_progress, PROCESSES, case.schedule.ranks, case.steps),
    )
    return Report(
        case,
        _facts(case),
        tuple(sum(float(loss) for lane in step.losses for loss in lane) for step in truth),  # already divided by M
        tensors_compared(case, truth),
        _stage_sizes(case, truth[-1]),
        tuple(failed_sanity_checks(truth, initial)),
        (
            compare_outcome(case, FAKE, truth, Outcome((of_fake,), references.seconds)),
            compare_outcome(case, PROCESSES, truth, of_processes),
        ),
        time.monotonic() - started,
    )


def _check(case: Case) -> None:
    """Raise ``RuleError`` if the case cannot be trained, or not on this machine."""
    if case.on_gpu and torch.cuda.device_count() == 0:
        got = f"torch {torch.__version__} finds none"
        raise RuleError("the device cuda needs a GPU and a torch built for it", got, "use cpu")
    if case.on_gpu and not case.staged:
        raise RuleError(
            "several ranks on one GPU cannot use NCCL, and gloo cannot send CUDA tensors",
            f"got the device {case.device} and direct messages",
            "use staged messages here, and tests/gpu under torchrun for NCCL with one GPU per rank",
        )
    if not any(case.schedule.microbatches.values()):
        raise RuleError("a schedule to verify must run microbatches", "got one without ops", "add F, B and W")
    for lane, count in case.schedule.microbatches.items():
        named = {placed.op.mb for placed in case.schedule if placed.op.lane == lane}
        if len(named) != count:
            raise RuleError(
                "the microbatches of a lane must be numbered from 0 without gaps",
                f"lane {lane} names {len(named)}, the largest being {count - 1}",
                "renumber them",
            )


def compare_outcome(case: Case, name: str, truth: Sequence[StepTruth], outcome: Outcome[list[StepTrace]]) -> Traced:
    """Compare what an implementation recorded with the oracle; if a rank failed, the failures are the result."""
    if outcome.failures:
        return Traced(name, (), outcome.failures, outcome.seconds, name == FAKE)
    traces = merge(outcome.values())
    found = tuple(differences(case.schedule, truth, traces))
    return Traced(name, found, (), outcome.seconds, name == FAKE, traces)


def _run_reference(case: Case, context: Context) -> Any:
    """Rank 0 is the oracle, rank 1 the fake ranks; neither sees the other."""
    return (run_oracle(case), initial_weights(case)) if context.rank == 0 else run_fake(case, context.progress)


def run_oracle(case: Case) -> list[StepTruth]:
    """Run the oracle in this process."""
    make_deterministic(case.device)
    stages = [case.stage(stage) for stage in range(case.schedule.stages)]
    return list(train(stages, case.data(), case.criterion, case.optimizer))


def initial_weights(case: Case) -> tuple[Mapping[str, Tensor], ...]:
    """The weights before the first step, by stage."""
    return tuple(weights_of(case.stage(stage)) for stage in range(case.schedule.stages))


def run_fake(case: Case, progress: Callable[[Any], None]) -> list[StepTrace]:
    """Run the fake ranks in this process."""
    make_deterministic(case.device)
    stages = [case.stage(stage) for stage in range(case.schedule.stages)]
    steps = fake.train(
        case.schedule,
        stages,
        case.data(),
        case.criterion,
        case.optimizer,
        blocking=case.blocking,
        seed=case.seed,
    )
    traces = []
    for number, trace in enumerate(steps, start=1):
        traces.append(trace)
        progress(number)
    return traces


def _time_limit(case: Case) -> float:
    ops = sum(1 for _ in case.schedule)
    return (_SPARE + _PER_OP * ops) * case.steps + 2 * case.timeout


def _facts(case: Case) -> dict[str, Any]:
    return {
        "schedule": case.schedule.name,
        "ranks": case.schedule.ranks,
        "microbatches": case.microbatches,
        "stages": case.schedule.stages,
        "dtype": str(case.model.dtype).removeprefix("torch."),
        "device": case.device,
        "steps": case.steps,
        "overlap": case.overlap,
    }


def tensors_compared(case: Case, truth: Sequence[StepTruth]) -> int:
    """The number of tensors compared: all losses, and the lane gradients, gradients and weights of every replica."""
    lanes = len(case.lanes)
    return sum(
        sum(map(len, step.losses))
        + sum(len(stage) for lane in step.lane_gradients for stage in lane)
        + lanes * sum(map(len, step.gradients))
        + lanes * sum(map(len, step.weights))
        for step in truth
    )


def _stage_sizes(case: Case, last: StepTruth) -> tuple[StageSize, ...]:
    routes = case.schedule.routes
    return tuple(
        StageSize.of(
            last.weights[stage].values(),
            last.gradients[stage].values(),
            ", ".join(f"{route[stage]}{lane}" for lane, route in routes.items()),
        )
        for stage in range(case.schedule.stages)
    )
