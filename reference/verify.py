"""The trial: oracle, fake ranks and production processes on one case, held against each other bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualpipe.errors import RuleError, UndecidedError
from dualpipe.schedule import Schedule
from reference import fake
from reference.case import DTYPES, Case, make_deterministic
from reference.launch import Context, Failure, Outcome, launch
from reference.model import ModelConfig
from reference.oracle import StepTruth, train, weights_of
from reference.party import Party, Progress
from reference.production import run_rank
from reference.trace import StepTrace, differences, merge, vital_signs

FAKE, PROCESSES = "fake ranks", "processes"
_SPARE, _PER_OP = 30.0, 0.1
"""Seconds that a party has for a step, and for each of its ops, beyond the timeout of a wait, before it is ended."""

RankBody = Callable[[Case, Callable[[Any], None]], list[StepTrace]]


@dataclass(frozen=True)
class Traced(Party):
    """A party with what it had to show of each step."""

    traces: Sequence[StepTrace] = field(default=(), repr=False)


@dataclass(frozen=True)
class Report:
    """The outcome of a verification."""

    case: Case
    truth: tuple[StepTruth, ...] = field(repr=False)
    complaints: tuple[str, ...]
    parties: tuple[Traced, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        return not self.complaints and all(party.equal for party in self.parties)

    @property
    def exit_code(self) -> int:
        return 0 if self.equal else 1

    @property
    def losses(self) -> list[float]:
        """The mean loss of each step: the criterion divides by the number of microbatches, so the sum is the mean."""
        return [sum(float(loss) for lane in step.losses for loss in lane) for step in self.truth]

    def as_json(self) -> dict[str, Any]:
        case = self.case
        return {
            "schedule": case.schedule.name,
            "ranks": case.schedule.ranks,
            "microbatches": case.microbatches,
            "stages": case.schedule.stages,
            "dtype": str(case.model.dtype).removeprefix("torch."),
            "device": case.device,
            "steps": case.steps,
            "verdict": "equal" if self.equal else "different",
            "losses": self.losses,
            "tensors": tensors_compared(case, self.truth),
            "complaints": list(self.complaints),
            "parties": {party.name: party.as_json() for party in self.parties},
            "seconds": round(self.seconds, 3),
        }


def make_case(
    schedule: Schedule,
    dtype: str,
    steps: int,
    seed: int,
    device: str,
    transport: str,
    blocking: bool,
    timeout: float,
    timed: bool = False,
) -> Case:
    """A case from the words of the command line.  Raises ``RuleError`` for what does not fit together."""
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise RuleError("--device is cpu or cuda", f"got {device}", "choose one of them")
    if transport not in ("direct", "staged"):
        raise RuleError("--transport is direct or staged", f"got {transport}", "choose one of them")
    if kind == "cuda" and torch.cuda.device_count() == 0:
        got = f"torch {torch.__version__} sees none"
        raise RuleError("--device cuda needs a GPU and a torch built for it", got, "use cpu")
    if kind == "cuda" and transport == "direct":
        raise RuleError(
            "several ranks on one GPU cannot use NCCL, and gloo cannot send CUDA tensors",
            "got --device cuda --transport direct",
            "use --transport staged here, and tests/gpu under torchrun for NCCL with one GPU a rank",
        )
    if not 0 < timeout < 1e6:
        raise RuleError("--timeout is a number of seconds", f"got {timeout}", "use 60")
    if not any(schedule.microbatches.values()):
        raise RuleError("a schedule to verify runs microbatches", "got one without ops", "add F, B and W")
    for lane, count in schedule.microbatches.items():
        named = {placed.op.mb for placed in schedule if placed.op.lane == lane}
        if len(named) != count:
            raise RuleError(
                "the microbatches of a lane are numbered from 0 without gaps",
                f"lane {lane} names {len(named)}, the largest being {count - 1}",
                "number them anew",
            )
    model = ModelConfig(dtype=DTYPES[dtype])
    return Case(schedule, model, steps, seed, device, transport == "staged", blocking, timeout, timed)


def verify(
    case: Case, on_progress: Progress = lambda party, rank, steps: None, rank_body: RankBody = run_rank
) -> Report:
    """Run every party in processes of their own and compare; ``rank_body`` is for tests that bring a faulty rank."""
    started = time.monotonic()
    judges = launch(
        2,
        lambda context: _judge(case, context),
        _allowed(case),
        _allowed(case),  # one judge's failure is no reason to end the other
        None,
        lambda rank, steps: on_progress(FAKE, 0, steps),
    )
    judged, imitation = judges.results
    truth, initial = (judged, ()) if isinstance(judged, Failure) else judged
    if isinstance(truth, Failure):
        raise UndecidedError(f"the oracle failed, so there is nothing to compare with: {truth.text}\n{truth.trace}")
    outcome: Outcome[list[StepTrace]] = launch(
        case.schedule.ranks,
        lambda context: rank_body(case, context.progress),
        _allowed(case),
        case.timeout + 5,
        "gloo",
        lambda rank, value: on_progress(PROCESSES, rank, value),
    )
    fakes: Outcome[list[StepTrace]] = Outcome((imitation,), judges.seconds)
    parties = (
        judge(case, FAKE, truth, fakes),
        judge(case, PROCESSES, truth, outcome),
    )
    return Report(case, tuple(truth), tuple(vital_signs(truth, initial)), parties, time.monotonic() - started)


def judge(case: Case, name: str, truth: Sequence[StepTruth], outcome: Outcome[list[StepTrace]]) -> Traced:
    """Hold one party's results against the oracle's; where a rank failed, its failures are the result."""
    if outcome.failures:
        return Traced(name, (), outcome.failures, outcome.seconds, name == FAKE)
    traces = merge(outcome.values())
    found = tuple(differences(case.schedule, truth, traces))
    return Traced(name, found, (), outcome.seconds, name == FAKE, traces)


def run_oracle(case: Case) -> list[StepTruth]:
    """The truth for a case, in this process."""
    make_deterministic(case.device)
    stages = [case.stage(stage) for stage in range(case.schedule.stages)]
    return list(train(stages, case.data(), case.criterion, case.optimizer))


def initial_weights(case: Case) -> tuple[Mapping[str, Tensor], ...]:
    """The weights with which every party begins, stage by stage."""
    return tuple(weights_of(case.stage(stage)) for stage in range(case.schedule.stages))


def run_fake(case: Case, progress: Callable[[Any], None]) -> list[StepTrace]:
    """The fake ranks on a case, in this process."""
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
    for number, step in enumerate(steps, start=1):
        losses = {
            lane: {mb: loss for mb, loss in enumerate(found) if loss is not None}
            for lane, found in zip(case.lanes, step.losses, strict=True)
        }
        traces.append(StepTrace(losses, dict(step.lane_gradients), dict(step.gradients), dict(step.weights)))
        progress(number)
    return traces


def _judge(case: Case, context: Context) -> Any:
    """Two processes side by side: the oracle and the fake ranks, which do not see each other."""
    return (run_oracle(case), initial_weights(case)) if context.rank == 0 else run_fake(case, context.progress)


def _allowed(case: Case) -> float:
    ops = sum(1 for _ in case.schedule)
    return (_SPARE + _PER_OP * ops) * case.steps + 2 * case.timeout


def tensors_compared(case: Case, truth: Sequence[StepTruth]) -> int:
    """How many tensors each party is compared in: losses, and for every copy lane gradients, gradients, weights."""
    lanes = len(case.lanes)
    return sum(
        sum(map(len, step.losses))
        + sum(len(stage) for lane in step.lane_gradients for stage in lane)
        + lanes * sum(map(len, step.gradients))
        + lanes * sum(map(len, step.weights))
        for step in truth
    )
