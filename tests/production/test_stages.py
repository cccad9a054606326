"""Unusual stages, criteria and data: each trains to autograd's own bits, or ends in an error with the reason.

Two ranks, 1F1B (lane >: stage 0 on rank 0, stage 1 on rank 1) or DualPipe (lane < the other way round).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from dualpipe.errors import RuleError, StageError
from dualpipe.pipeline import Feed, Pipeline
from dualpipe.runtime.executor import StepError
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import SpoiledError, TensorSpec
from dualpipe.schedule.generate import generate
from dualpipe.testing.launch import launch

WIDTH, BATCH = 4, 3
REAL = TensorSpec((BATCH, WIDTH), torch.float32)


class Stage(nn.Module):
    """A stage whose forward is ``function(self, *inputs)``."""

    def __init__(self, function: Callable, **parts) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def linear() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


def plain() -> Stage:
    return Stage(lambda s, x: s.layer(x), layer=linear())


def reusing(stage: Stage, x: torch.Tensor) -> torch.Tensor:
    """Writes its output into one buffer for all microbatches."""
    return Reuse.apply(stage.layer(x), stage.out)


class Reuse(torch.autograd.Function):
    """Gives ``out`` the gradient of ``y``."""

    @staticmethod
    def forward(ctx, y, out):
        out.copy_(y)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def moved(stage: Stage, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(stage.layer.weight, "main_grad"):
        stage.layer.weight.main_grad = torch.zeros(WIDTH, WIDTH)
        stage.layer.weight.register_post_accumulate_grad_hook(into_main_grad)
    return stage.layer(x)


def into_main_grad(weight: torch.Tensor) -> None:
    weight.main_grad += weight.grad
    weight.grad = None


def looked_up(stage: Stage, x: torch.Tensor) -> torch.Tensor:
    return stage.layer(x) + stage.table(torch.zeros(BATCH, dtype=torch.int64))


@dataclass(frozen=True)
class Trial:
    """Stages 0 and 1 (equal on both lanes), what crosses between them, and what an error must say."""

    stages: Callable[[], tuple[nn.Module, nn.Module]]
    boundary: tuple[TensorSpec, ...] = (REAL,)
    criterion: Callable | None = nn.functional.mse_loss
    schedule: str = "1f1b"
    error: str = ""
    change: Callable[[dict], dict] = field(default=lambda batches: batches)
    steps: int = 1


def mean(outputs, targets):
    return nn.functional.mse_loss(outputs, targets)


TRIALS = {
    "complex numbers cross": Trial(
        lambda: (
            Stage(lambda s, x: torch.complex(s.a(x), s.b(x)), a=linear(), b=linear()),
            Stage(lambda s, z: s.a(z.real) + s.b(z.imag), a=linear(), b=linear()),
        ),
        (TensorSpec((BATCH, WIDTH), torch.complex64),),
    ),
    "stages of different widths, with numbers that have no gradient beside": Trial(
        lambda: (
            Stage(lambda s, x: (s.a(x), torch.arange(BATCH)), a=nn.Linear(WIDTH, 7)),
            Stage(lambda s, x, rows: s.a(x)[rows], a=nn.Linear(7, WIDTH)),
        ),
        (TensorSpec((BATCH, 7), torch.float32), TensorSpec((BATCH,), torch.int64)),
    ),
    "a weight that crosses to the next stage": Trial(
        lambda: (
            Stage(lambda s, x: (s.a(x), s.a.weight), a=linear()),
            Stage(lambda s, x, weight: s.a(x) + weight.sum(), a=linear()),
        ),
        (REAL, TensorSpec((WIDTH, WIDTH), torch.float32)),
        schedule="zb1p",
    ),
    "bare tensors as microbatches": Trial(
        lambda: (plain(), plain()),
        change=lambda batches: {lane: [x for (x,) in given] for lane, given in batches.items()},
    ),
    "two steps with the defaults add up": Trial(lambda: (plain(), plain()), schedule="dualpipe", steps=2),
    "an output of another shape than the boundary's": Trial(
        lambda: (Stage(lambda s, x: s.a(x), a=nn.Linear(WIDTH, 7)), plain()),
        error=r"0SF0> sends \[3, 7\] float32 where the boundary is \[3, 4\] float32",
    ),
    "an output of another dtype": Trial(
        lambda: (Stage(lambda s, x: s.a(x).double(), a=linear()), plain()),
        error=r"0SF0> sends \[3, 4\] float64 where",
    ),
    "an output that is not a tensor": Trial(
        lambda: (Stage(lambda s, x: {"y": s.a(x)}, a=linear()), plain()), error="at 0F0> it returned dict"
    ),
    "a loss that is not a scalar": Trial(
        lambda: (plain(), plain()),
        criterion=lambda y, t: y - t,
        error=r"at 1F0> it returned a tensor of shape \[3, 4\]",
    ),
    "no criterion": Trial(lambda: (plain(), plain()), criterion=None, error="1F0> has none"),
    "a loss without a gradient": Trial(
        lambda: (plain(), plain()), criterion=lambda y, t: mean(y, t).detach(), error="a loss with a gradient.*1F0>"
    ),
    "an output without its input": Trial(
        lambda: (plain(), Stage(lambda s, x: s.a(x.detach()), a=linear())), error="must pass a gradient on.*1B0>"
    ),
    "more microbatches than the schedule has": Trial(
        lambda: (plain(), plain()),
        change=lambda batches: {lane: [*given, given[0]] for lane, given in batches.items()},
        error="of 5 microbatches for 4",
    ),
    "fewer": Trial(
        lambda: (plain(), plain()),
        change=lambda batches: {lane: given[1:] for lane, given in batches.items()},
        error="of 3 microbatches for 4",
    ),
    "one tensor for all microbatches": Trial(
        lambda: (plain(), plain()),
        change=lambda batches: {lane: torch.stack([x for (x,) in given]) for lane, given in batches.items()},
        error="has a tensor of shape",
    ),
    "an output buffer that is used again": Trial(
        lambda: (Stage(reusing, layer=linear(), out=torch.zeros(BATCH, WIDTH)), plain()),
        error="was written to",
    ),
    "gradients that a hook moves": Trial(
        lambda: (Stage(moved, layer=linear()), plain()), schedule="dualpipe", error="has a main_grad and no .grad"
    ),
    "sparse gradients": Trial(
        lambda: (Stage(looked_up, layer=linear(), table=nn.Embedding(2, WIDTH, sparse=True)), plain()),
        schedule="dualpipe",
        error="that of table.weight is torch.sparse_coo",
    ),
    "buffers that each lane changes in its own way": Trial(
        lambda: (nn.Sequential(linear(), nn.BatchNorm1d(WIDTH)), plain()),
        schedule="dualpipe",
        error="running_mean of stage 0 is changed by its forward",
    ),
}


def batches_of(schedule, seed):
    torch.manual_seed(seed)
    return {lane: [(torch.randn(BATCH, WIDTH),) for _ in range(count)] for lane, count in schedule.microbatches.items()}


def autograd(trial: Trial, schedule):
    """Each stage's gradients: in each step, the sum over the lanes of the sums over their microbatches."""
    torch.manual_seed(1)
    stages = trial.stages()
    totals: list[torch.Tensor | None] = [None for stage in stages for _ in stage.parameters()]
    for number in range(trial.steps):
        step: list[torch.Tensor | None] = [None] * len(totals)
        for lane, inputs in batches_of(schedule, number).items():
            parts = copy.deepcopy(stages)
            for (x,), (target,) in zip(inputs, batches_of(schedule, 7)[lane], strict=True):
                crossing = parts[0](x)
                crossing = crossing if isinstance(crossing, tuple) else (crossing,)
                trial.criterion(parts[1](*crossing), target).backward()
            lane_sum = [p.grad for part in parts for p in part.parameters()]
            step = [b if a is None else a + b for a, b in zip(step, lane_sum, strict=True)]
        totals = [b if a is None else a + b for a, b in zip(totals, step, strict=True)]
    return totals


def production(trial: Trial, rank: int):
    schedule = generate(trial.schedule, 2, 4)
    torch.manual_seed(1)
    stages = trial.stages()
    held = {
        (lane, route.index(rank)): copy.deepcopy(stages[route.index(rank)]) for lane, route in schedule.routes.items()
    }
    transport = ProcessGroupTransport(timeout=10.0)
    with Pipeline(schedule, held, trial.criterion, list(trial.boundary), transport) as pipeline:
        try:
            for number in range(trial.steps):
                pipeline.step(Feed(trial.change(batches_of(schedule, number)), batches_of(schedule, 7)))
        except Exception as error:
            first = f"{type(error).__name__}: {error}"
            with pytest.raises((SpoiledError, StageError)):
                pipeline.step(Feed({}, {}))
            return first
        return {stage: [p.grad for p in module.parameters()] for (_, stage), module in held.items()}


@pytest.fixture(scope="module")
def outcomes():
    def body(context):
        return {name: production(trial, context.rank) for name, trial in TRIALS.items()}

    return launch(2, body, timeout=100).values()


@pytest.mark.parametrize("name", [name for name, trial in TRIALS.items() if not trial.error])
def test_unusual_stages_train_to_the_bits_of_autograd(name, outcomes):
    trial = TRIALS[name]
    wanted = autograd(trial, generate(trial.schedule, 2, 4))
    for found in outcomes:
        assert isinstance(found[name], dict), found[name]
    split = len(list(trial.stages()[0].parameters()))
    for stage, expected in ((0, wanted[:split]), (1, wanted[split:])):
        for rank in outcomes:
            for a, b in zip(rank[name].get(stage, expected), expected, strict=True):
                assert torch.equal(a, b)
                assert b.any()


@pytest.mark.parametrize("name", [name for name, trial in TRIALS.items() if trial.error])
def test_what_cannot_be_trained_is_an_error_on_every_rank(name, outcomes):
    assert all(isinstance(found[name], str) for found in outcomes), outcomes
    errors = [found[name] for found in outcomes]
    assert any(re.search(f"^StageError: .*{TRIALS[name].error}", text) for text in errors), errors


def test_weights_that_start_apart_are_an_error_at_the_first_sum():
    schedule = generate("dualpipe", 2, 4)

    def body(context):
        torch.manual_seed(context.rank)  # and so the lanes' replicas differ
        held = {(lane, route.index(context.rank)): plain() for lane, route in schedule.routes.items()}
        pipeline = Pipeline(schedule, held, mean, [REAL], ProcessGroupTransport(timeout=10.0))
        with pytest.raises((StageError, StepError, SpoiledError)) as error:  # of this rank, or heard from the other
            pipeline.step(Feed(batches_of(schedule, 0), batches_of(schedule, 7)))
        return str(error.value)

    for text in launch(2, body, timeout=30).values():
        assert re.search(r"layer\.weight of stage \d differs between the lanes", text)


def test_zeroed_gradients_are_not_added_twice():
    """``zero_grad(set_to_none=False)`` leaves the very tensors that the last step summed."""
    schedule = generate("dualpipe", 2, 4)

    def body(context):
        torch.manual_seed(0)
        held = {(lane, route.index(context.rank)): plain() for lane, route in schedule.routes.items()}
        pipeline = Pipeline(schedule, held, mean, [REAL], ProcessGroupTransport(timeout=10.0))
        pipeline.copy_weights()
        found = []
        for _ in range(2):
            for module in held.values():
                module.zero_grad(set_to_none=False)
            pipeline.step(Feed(batches_of(schedule, 0), batches_of(schedule, 7)))
            found.append([p.grad.clone() for module in held.values() for p in module.parameters()])
        return found

    for first, second in launch(2, body, timeout=30).values():
        assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


def test_a_gradient_that_was_summed_is_not_summed_again():
    """Nor by another pipeline, nor where a clipping library has replaced it by a copy; a new one is."""
    schedule = generate("dualpipe", 2, 4)

    def body(context):
        torch.manual_seed(0)
        held = {(lane, route.index(context.rank)): plain() for lane, route in schedule.routes.items()}
        parameters = [p for module in held.values() for p in module.parameters()]
        feed = Feed(batches_of(schedule, 0), batches_of(schedule, 7))
        first, second = (Pipeline(schedule, held, mean, [REAL], ProcessGroupTransport(timeout=10.0)) for _ in range(2))
        first.copy_weights()
        first.step(feed)
        once = [p.grad.clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = parameter.grad.clone()
        first.step(feed)
        second.step(feed)
        thrice = all(torch.equal(p.grad, one + one + one) for p, one in zip(parameters, once, strict=True))
        with torch.inference_mode():
            first.step(feed, forward_only=True)
        first.reduce_gradients()
        again = all(torch.equal(p.grad, one + one + one) for p, one in zip(parameters, once, strict=True))
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)  # as of a backward outside the pipeline
        first.reduce_gradients()
        return {"thrice": thrice, "again": again, "new": all((p.grad == 2).all() for p in parameters)}

    assert launch(2, body, timeout=30).values() == [{"thrice": True, "again": True, "new": True}] * 2


def test_a_criterion_with_weights_of_its_own_is_refused_on_two_lanes():
    schedule = generate("dualpipe", 2, 4)

    def body(context):
        held = {(lane, route.index(context.rank)): plain() for lane, route in schedule.routes.items()}
        with pytest.raises(RuleError, match="a criterion must have no weights of its own"):
            Pipeline(schedule, held, linear(), [REAL], ProcessGroupTransport(timeout=10.0))
        return True

    assert all(launch(2, body, timeout=30).values())


def test_deepseeks_names_cut_only_what_has_the_batch():
    from dualpipe.runtime.deepseek import _cut

    x, lengths = torch.zeros(8, 3), torch.zeros(9)
    for first, nothing, last in _cut("inputs", [x, None, x], 4, 0):
        assert first.shape == last.shape == (2, 3)
        assert nothing is None
    for tensors in ([x, lengths], [torch.zeros(6, 3)], [torch.zeros(())]):
        with pytest.raises(StageError, match="cut into microbatches along dimension 0"):
            _cut("inputs", tensors, 4, 0)
