"""Microbatches with shapes of their own: the shape of each activation is sent before it, and gradients are bitwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.program import compile_program
from dualpipe.runtime.transport import TensorSpec
from dualpipe.schedule import COMPUTE, MESSAGES, Kind, Op, Schedule, Slot
from dualpipe.schedule.generate import generate
from dualpipe.schedule.shapes import with_shape_exchange
from dualpipe.schedule.text import dumps, loads
from dualpipe.testing.launch import launch

WIDTH = 4
BOUNDARY = [TensorSpec((1, WIDTH), torch.float32), TensorSpec((1,), torch.int64)]
"""Of whose shapes the numbers of dimensions count alone."""


class Stage(nn.Module):
    """A linear layer on [rows, WIDTH] numbers, which passes on [rows] integers that scale its output."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, scale):
        return torch.tanh(self.linear(x)) * scale[:, None], scale


def loss(y, scale):
    return y.square().mean()


def microbatches(schedule):
    """By lane, microbatches of 1 to 5 rows, also of equal size one after the other."""
    torch.manual_seed(7)
    return {
        lane: [
            (torch.randn(1 + (3 * number // 2) % 5, WIDTH), torch.arange(1, 2 + (3 * number // 2) % 5))
            for number in range(count)
        ]
        for lane, count in schedule.microbatches.items()
    }


def plainly(schedule):
    """Each stage's gradients in a plain loop: each lane's sum first, then the sum over the lanes."""
    lanes = []
    for given in microbatches(schedule).values():
        stages = [Stage(number) for number in range(schedule.stages)]
        for values in given:
            for stage in stages:
                values = stage(*values)
            loss(*values).backward()
        lanes.append([[parameter.grad for parameter in stage.parameters()] for stage in stages])
    return [
        [sum(parts[1:], parts[0]) for parts in zip(*replicas, strict=True)] for replicas in zip(*lanes, strict=True)
    ]


def pipeline_of(schedule, rank, **options):
    stages = {
        (lane, number): Stage(number)
        for lane, route in schedule.routes.items()
        for number, holder in enumerate(route)
        if holder == rank
    }
    transport = ProcessGroupTransport(timeout=10.0)
    return Pipeline(schedule, stages, loss, BOUNDARY, transport, variable_shapes=True, **options)


def feed_of(schedule):
    inputs = microbatches(schedule)
    return Feed(inputs, {lane: [()] * len(given) for lane, given in inputs.items()})


@pytest.mark.parametrize(("name", "blocking"), [("dualpipe", False), ("dualpipev", True)])
def test_gradients_are_those_of_a_plain_loop(name, blocking):
    schedule = generate(name, 4 if name == "dualpipe" else 2, 8)
    true = plainly(schedule)

    def body(context):
        pipeline = pipeline_of(schedule, context.rank, blocking=blocking)
        evaluated = pipeline.step(feed_of(schedule), forward_only=True).losses
        trained = pipeline.step(feed_of(schedule)).losses
        assert evaluated == trained
        return {
            stage: all(torch.equal(p.grad, truth) for p, truth in zip(module.parameters(), true[stage], strict=True))
            for (_, stage), module in pipeline.stages.items()
        }

    for found in launch(schedule.ranks, body).values():
        assert found == dict.fromkeys(found, True)


def test_the_sends_of_a_step_do_not_pile_up():
    schedule = generate("dualpipe", 2, 40)

    def body(context):
        pipeline, most = pipeline_of(schedule, context.rank), 0

        def observe(slot: Slot, op: Op, began: float, ended: float) -> None:
            nonlocal most
            most = max(most, len(pipeline.transport._outstanding._messages))

        pipeline._observe = observe
        pipeline.step(feed_of(schedule))
        return most

    assert max(launch(2, body).values()) <= 12


def test_the_compiled_program_is_the_schedule_with_the_exchange():
    schedule = with_shape_exchange(generate("dualpipe", 4, 8))
    assert tuple(compile_program(schedule, rank).slots for rank in range(4)) == schedule.programs
    assert Kind.AR in {op.kind for slot in compile_program(schedule, 0, forward_only=True).slots for op in slot}


def test_another_collective_is_not_taken_for_an_exchange():
    text = dumps(with_shape_exchange(generate("dualpipe", 4, 8))).replace("0AR>@0 0SF0>", "0AA0>@0 0SF0>", 1)
    step = next(step for step in compile_program(loads(text), 0).steps if step.fault)
    assert step.fault == "0AA0>@0 is not the exchange of the shapes of 0SF0>"
    last = next(step for step in compile_program(loads(f"{text.rstrip()} 3AR<@3\n"), 3).steps if step.fault)
    assert last.fault == "3AR<@3 is not the exchange of the shapes of a slot of messages"


def test_a_stage_that_returns_another_number_of_dimensions_is_refused():
    schedule = generate("dualpipe", 2, 4)

    def body(context):
        pipeline = pipeline_of(schedule, context.rank)
        inputs = {lane: [(x, s[:, None]) for x, s in given] for lane, given in microbatches(schedule).items()}
        pipeline.step(Feed(inputs, {lane: [()] * len(given) for lane, given in inputs.items()}))

    failures = launch(2, body).failures
    assert any("a stage must return the tensors that its boundary declares" in str(failure) for failure in failures)


def test_the_exchange_can_be_left_out_again():
    schedule: Schedule = generate("dualpipe", 4, 8)
    assert with_shape_exchange(schedule).only(COMPUTE | MESSAGES).programs == schedule.programs
    assert with_shape_exchange(with_shape_exchange(schedule)) == with_shape_exchange(schedule)
