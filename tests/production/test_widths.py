"""Stages of different widths, some weights and biases frozen: every boundary has a shape of its own.

stage        0        1             2               3
numbers    6 -> 4   4 -> 5        5 -> 3          3 -> 2
frozen              the biases    the weights

A receive with another boundary's shape, or a gradient for a frozen parameter, fails at once.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.executor import StepError
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import DisagreementError, SpoiledError, TensorSpec
from dualpipe.schedule import SENDS, UP, Op, Schedule, W
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import launch
from reference import fake, oracle
from reference.comparison import differences
from reference.data import Batch
from reference.trace import StepTrace, merge
from tests.production.test_pipeline import held_by

WIDTHS = (6, 4, 5, 3, 2)
BATCH = 3


def stage(number: int) -> nn.Module:
    torch.manual_seed(number)
    before, after = WIDTHS[number : number + 2]
    built = nn.Sequential(nn.Linear(before, after), nn.Tanh(), nn.Linear(after, after))
    for name, parameter in built.named_parameters():
        parameter.requires_grad_({1: "weight", 2: "bias"}.get(number, "") in name)
    return built


def boundary(sender: int) -> list[TensorSpec]:
    return [TensorSpec((BATCH, WIDTHS[sender + 1]), torch.float32)]


def data(schedule: Schedule) -> list[list[list[Batch]]]:
    torch.manual_seed(7)
    batches = [
        [Batch(torch.randn(BATCH, WIDTHS[0]), torch.randn(BATCH, WIDTHS[-1])) for _ in range(count)]
        for count in schedule.microbatches.values()
    ]
    return [batches]


def feed(schedule: Schedule) -> Feed:
    given = dict(zip(schedule.lanes, data(schedule)[0], strict=True))
    inputs = {lane: [(batch.tokens,) for batch in batches] for lane, batches in given.items()}
    return Feed(inputs, {lane: [(batch.targets,) for batch in batches] for lane, batches in given.items()})


def pipeline_of(schedule: Schedule, rank: int, transport: ProcessGroupTransport | None = None, **options) -> Pipeline:
    stages = {(lane, number): stage(number) for lane, number in held_by(schedule, rank)}
    transport = transport or ProcessGroupTransport(timeout=10.0)
    return Pipeline(schedule, stages, nn.functional.mse_loss, boundary, transport, **options)


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("name", ["dualpipe", "zb1p"])
def test_stages_of_different_widths_train_to_the_oracles_bits_on_processes_and_on_fake_ranks(name):
    schedule = generate(name, 4, 8)
    stages = [stage(number) for number in range(4)]
    (truth,) = oracle.train(stages, data(schedule), nn.functional.mse_loss, optimizer)
    assert [len(found) for found in truth.gradients] == [4, 2, 2, 4]

    def body(context):
        pipeline = pipeline_of(schedule, context.rank)
        stepper = optimizer([weight for held in pipeline.stages.values() for weight in held.parameters()])
        result = pipeline.step(feed(schedule), reduce_gradients=False)
        alone = {held: oracle.gradients_of(module) for held, module in pipeline.stages.items()}
        pipeline.reduce_gradients()
        summed = {held: oracle.gradients_of(module) for held, module in pipeline.stages.items()}
        pipeline.step(feed(schedule), forward_only=True)  # an evaluation leaves the gradients as they are
        for held, module in pipeline.stages.items():
            found = oracle.gradients_of(module)
            assert found.keys() == summed[held].keys()
            assert all(torch.equal(found[name], summed[held][name]) for name in found)
        stepper.step()
        weights = {held: oracle.weights_of(module) for held, module in pipeline.stages.items()}
        return [StepTrace({lane: dict(losses) for lane, losses in result.losses.items()}, alone, summed, weights)]

    found = merge(launch(4, body, timeout=60).values())
    assert differences(schedule, [truth], found) == []

    (step,) = fake.train(schedule, stages, data(schedule), nn.functional.mse_loss, optimizer)
    assert differences(schedule, [truth], [step]) == []


def errors_of(*pipelines) -> list[list[str]]:
    """For each rank, the errors of a step of each of the pipelines, which are functions of the rank."""

    def body(context):
        errors = []
        for build in pipelines:
            pipeline = build(context.rank)
            try:
                pipeline.step(feed(SOUND))
            except (StepError, DisagreementError, SpoiledError) as error:
                errors.append(f"{type(error).__name__}: {error}")
            else:
                errors.append("no error")
            dist.barrier()  # otherwise a rank that closes its connections early would be named as the cause
        return errors

    return launch(4, body, timeout=60).values()


SOUND = generate("1f1b", 4, 4)


def test_a_second_w_after_a_full_backward_and_one_rank_that_blocks_are_refused():
    again = (Op(W, UP, 0, 3),)  # at the end of rank 0, for whom no other rank waits then
    doubled = Schedule(SOUND.routes, ((*SOUND.programs[0], again), *SOUND.programs[1:]), SOUND.name)
    short = partial(ProcessGroupTransport, timeout=5.0)
    found = errors_of(
        lambda rank: pipeline_of(SOUND, rank, short(), blocking=rank == 1),
        lambda rank: pipeline_of(doubled, rank, short()),
    )
    for otherwise, _ in found:
        assert otherwise.startswith("DisagreementError: every rank runs with the same way of waiting: ")
        assert "ranks 0, 2, 3 have at use; rank 1 has blocking" in otherwise
    assert "(0W3>): " in found[0][1]


class Broken:
    """A message that completes and then reports an error."""

    def __init__(self, work):
        self.work = work

    def wait(self, *arguments):
        self.work.wait(*arguments)
        raise RuntimeError("the connection broke")

    def is_completed(self):
        return self.work.is_completed()


@pytest.mark.parametrize("which", [0, -1], ids=["the first send", "the last send"])
def test_an_error_of_a_send_that_has_completed_is_an_error_of_the_step(monkeypatch, which):
    """That of the last send shows only where the step waits for all its messages at the end."""
    post, sends = dist.batch_isend_irecv, 0
    number = range(sum(op.kind in SENDS for slot in SOUND.programs[1] for op in slot))[which]

    def post_and_break_one_send(ops):
        nonlocal sends
        works = post(ops)
        for at, op in enumerate(ops):
            if op.op is dist.isend:
                if dist.get_rank() == 1 and sends == number:
                    works[at] = Broken(works[at])
                sends += 1
        return works

    monkeypatch.setattr(dist, "batch_isend_irecv", post_and_break_one_send)
    found = errors_of(lambda rank: pipeline_of(SOUND, rank, ProcessGroupTransport(timeout=20.0)))
    assert "the connection broke" in found[1][0]
