"""Small models with their data, and functions that compare runs and change schedules."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dualpipe.schedule import Op, Program, Schedule, Slot
from reference import fake, oracle
from reference.data import Batch, Steps, training_data
from reference.model import ModelConfig, build_stages, criterion
from reference.oracle import StepTruth
from reference.trace import StepTrace

SMALL = ModelConfig(hidden=16, heads=2, sequence=8, batch=2)
ADAM = partial(torch.optim.AdamW, lr=1e-2)
SGD = partial(torch.optim.SGD, lr=0.5)


@dataclass(frozen=True)
class Trial:
    """A model and its data for a schedule's shape."""

    stages: Sequence[nn.Module]
    data: Steps
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer] = ADAM

    def truth(self) -> list[StepTruth]:
        return list(oracle.train(self.stages, self.data, self.criterion, self.optimizer))

    def run(self, schedule: Schedule, **options) -> list[StepTrace]:
        return list(fake.train(schedule, self.stages, self.data, self.criterion, self.optimizer, **options))


def decoder(schedule: Schedule, dtype=torch.float32, steps=2, config=SMALL, seed=3) -> Trial:
    """The decoder, cut into the schedule's stages."""
    counts = [schedule.microbatches[lane] for lane in schedule.lanes]
    return Trial(
        build_stages(replace(config, dtype=dtype), schedule.stages, seed),
        training_data(steps, counts, config.batch, config.sequence, seed),
        partial(criterion, scale=1 / sum(counts)),
    )


def toy(schedule: Schedule, width=4, steps=1) -> Trial:
    """Norm, linear, tanh in every stage, on random numbers; fast enough to run hundreds of times."""
    generator = torch.Generator().manual_seed(11)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        stages = [
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh()) for _ in range(schedule.stages)
        ]
    draw = partial(torch.randn, 3, width, generator=generator)
    data = [
        [[Batch(draw(), draw()) for _ in range(schedule.microbatches[lane])] for lane in schedule.lanes]
        for _ in range(steps)
    ]
    return Trial(stages, data, nn.functional.mse_loss, SGD)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def matches(schedule: Schedule, truth: Sequence[StepTruth], found: Sequence[StepTrace]) -> bool:
    """Whether every loss, every replica's gradients before and after the sum, and every weight are equal bitwise."""
    return len(truth) == len(found) and all(
        all(
            step.losses[lane].keys() == set(range(len(losses)))
            and all(torch.equal(loss, step.losses[lane][mb]) for mb, loss in enumerate(losses))
            for lane, losses in zip(schedule.lanes, true.losses, strict=True)
        )
        and all(
            same(true.lane_gradients[number][stage], step.lane_gradients[lane, stage])
            and same(true.gradients[stage], step.gradients[lane, stage])
            and same(true.weights[stage], step.weights[lane, stage])
            for number, lane in enumerate(schedule.lanes)
            for stage in range(schedule.stages)
        )
        for true, step in zip(truth, found, strict=True)
    )


def with_program(schedule: Schedule, rank: int, program: Sequence[Slot]) -> Schedule:
    programs: list[Program] = list(schedule.programs)
    programs[rank] = tuple(slot for slot in program if slot)
    return replace(schedule, programs=tuple(programs))


def change_slot(schedule: Schedule, rank: int, number: int, *slots: Slot) -> Schedule:
    """The schedule with one slot replaced by any number of slots."""
    program = schedule.programs[rank]
    return with_program(schedule, rank, (*program[:number], *slots, *program[number + 1 :]))


def where(schedule: Schedule, op: Op) -> tuple[int, int]:
    """The rank and the slot of an op that occurs once."""
    (found,) = [(placed.rank, placed.slot) for placed in schedule if placed.op == op]
    return found


def without(schedule: Schedule, op: Op) -> Schedule:
    rank, number = where(schedule, op)
    rest = tuple(other for other in schedule.programs[rank][number] if other != op)
    return change_slot(schedule, rank, number, rest)
