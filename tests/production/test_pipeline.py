"""What a training loop gets from a step: W computes the weight gradients, and the replicas of a stage stay equal.

lane >   stage 0 on rank 0, stage 1 on rank 1          each stage twice:
lane <   stage 0 on rank 1, stage 1 on rank 0          equal at the start, and its gradients summed at the end
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import TensorSpec
from dualpipe.schedule import B, Lane, Op, Schedule, Slot, W
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import launch

WIDTH, BATCH = 4, 3
Held = tuple[Lane, int]


class Stage(nn.Module):
    """Two linear layers and a buffer; every number drawn for the lane and stage that it is for."""

    def __init__(self, held: Held, lanes: list[Lane]) -> None:
        super().__init__()
        torch.manual_seed(10 * held[1] + lanes.index(held[0]))
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.register_buffer("seen", torch.randint(1000, (2,)))

    def forward(self, x):
        return self.layers(x)


def held_by(schedule: Schedule, rank: int) -> list[Held]:
    return [(lane, s) for lane, route in schedule.routes.items() for s, holder in enumerate(route) if holder == rank]


def pipeline_of(schedule: Schedule, rank: int, **options) -> Pipeline:
    stages = {held: Stage(held, list(schedule.lanes)) for held in held_by(schedule, rank)}
    boundary = [TensorSpec((BATCH, WIDTH), torch.float32)]
    return Pipeline(
        schedule, stages, lambda y: y.square().mean(), boundary, ProcessGroupTransport(timeout=10.0), **options
    )


def feed_of(schedule: Schedule) -> Feed:
    torch.manual_seed(99)
    inputs = {
        lane: [(torch.randn(BATCH, WIDTH),) for _ in range(count)] for lane, count in schedule.microbatches.items()
    }
    return Feed(inputs, {lane: [()] * len(given) for lane, given in inputs.items()})


def gradients(module: nn.Module) -> list[torch.Tensor]:
    """One tensor for each parameter; zeros where there is no gradient yet."""
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_in_a_step_b_defers_every_weight_gradient_to_its_w():
    schedule = generate("zb1p", 2, 5)

    def body(context):
        history: list[tuple[Slot, Op, list[torch.Tensor]]] = []
        pipeline = pipeline_of(
            schedule,
            context.rank,
            observe=lambda slot, op, began, ended: history.append((slot, op, gradients(*pipeline.stages.values()))),
        )
        pipeline.step(feed_of(schedule))
        faults, count = [], 0
        for (_, _, before), (slot, op, after) in pairwise(history):
            apart = {other.kind for other in slot} in ({B}, {W}) and op.mb > 0  # a first microbatch is run whole
            count += apart
            if apart and op.kind is B and not same(before, after):
                faults.append(f"the weight gradient of {op} is not deferred to W")
            if apart and op.kind is W and any(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                faults.append(f"{op} leaves a weight without its gradient")
        return faults, count

    for faults, count in launch(2, body, timeout=40).values():
        assert faults == []
        assert count == 8


def test_every_replica_of_a_stage_starts_from_the_first_lanes_weights():
    schedule = generate("dualpipe", 2, 4)

    def body(context):
        pipeline = pipeline_of(schedule, context.rank)
        pipeline.copy_weights()
        first = {held: Stage((schedule.lanes[0], held[1]), list(schedule.lanes)) for held in pipeline.stages}
        return [
            f"stage {held[1]} of lane {held[0]}: {name} differs from lane >"
            for held, module in pipeline.stages.items()
            for name, value in module.state_dict().items()
            if not torch.equal(value, first[held].state_dict()[name])
        ]

    assert launch(2, body, timeout=40).values() == [[], []]


def test_a_step_leaves_the_gradients_summed_over_both_replicas():
    schedule = generate("dualpipe", 2, 4)

    def body(context):
        pipeline = pipeline_of(schedule, context.rank)
        pipeline.copy_weights()
        pipeline.step(feed_of(schedule), reduce_gradients=False)
        own = {held: gradients(module) for held, module in pipeline.stages.items()}
        for module in pipeline.stages.values():
            module.zero_grad()
        pipeline.step(feed_of(schedule))
        return own, {held: gradients(module) for held, module in pipeline.stages.items()}

    ranks = launch(2, body, timeout=40).values()
    own = {held: found for of_rank, _ in ranks for held, found in of_rank.items()}
    summed = {held: found for _, of_rank in ranks for held, found in of_rank.items()}
    assert len(summed) == 4
    faults = []
    for lane, stage in summed:
        up, down = (own[other, stage] for other in schedule.lanes)
        if not same(summed[lane, stage], [a + b for a, b in zip(up, down, strict=True)]):
            faults.append(
                f"the gradient of stage {stage} at the end of lane {lane}'s step is not the sum of both replicas'"
            )
    assert faults == []
