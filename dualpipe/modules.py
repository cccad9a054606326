"""Stages that are plain modules: the data of a step, and what the interpreter asks of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from dualpipe.execute import OrderError, Tensors
from dualpipe.schedule import Lane, Op, Schedule

Stages = Mapping[tuple[Lane, int], nn.Module]


class Criterion(Protocol):
    """``criterion(*outputs, *labels)``: a scalar loss, scaled as its gradient shall be."""

    def __call__(self, *tensors: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Feed:
    """The data of one step on one rank.

    ``inputs[lane][mb]`` are the tensors of a microbatch for stage 0 (needed where the rank holds stage 0 of the
    lane), ``labels[lane][mb]`` those for the criterion (needed where it holds the last stage).  Microbatches all
    have the same shapes, contiguous and at aligned storage, where bitwise reproducibility is wanted.
    """

    inputs: Mapping[Lane, Sequence[Tensors]]
    labels: Mapping[Lane, Sequence[Tensors]]


@dataclass
class StepResult:
    """What a rank has after a step: for each lane whose last stage it holds, the losses (detached scalars) by
    microbatch, and the last stage's outputs where they were asked for."""

    losses: dict[Lane, dict[int, Tensor]] = field(default_factory=dict)
    outputs: dict[Lane, dict[int, Tensors]] = field(default_factory=dict)


@dataclass
class ModuleComputation:
    """Runs a step's forwards on plain modules and collects ``result``; a ``dualpipe.execute.Computation``."""

    schedule: Schedule
    stages: Stages
    criterion: Criterion | None
    feed: Feed
    keep_outputs: bool = False
    result: StepResult = field(default_factory=StepResult)

    def forward(self, op: Op, inputs: Tensors) -> Tensors:
        if self.schedule.is_first(op):
            inputs = _data(self.feed.inputs, op, "inputs")
        outputs = _tensors(self.stages[op.lane, op.stage](*inputs), op)
        return self.lose(op, outputs) if self.schedule.is_last(op) else outputs

    def around(self, op: Op) -> AbstractContextManager[object]:
        return nullcontext()

    def lose(self, op: Op, outputs: Tensors) -> Tensors:
        """The end of a forward on the last stage: the loss."""
        if self.keep_outputs:
            self.result.outputs.setdefault(op.lane, {})[op.mb] = tuple(output.detach() for output in outputs)
        if self.criterion is None:
            if torch.is_grad_enabled():
                raise OrderError(f"{op} is on the last stage, which trains with a criterion; the pipeline has none")
            return ()
        loss = self.criterion(*outputs, *_data(self.feed.labels, op, "labels"))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise OrderError(f"the criterion gives a scalar tensor; at {op} it gave {_kind(loss)}")
        self.result.losses.setdefault(op.lane, {})[op.mb] = loss.detach()
        return (loss,)


def _data(lanes: Mapping[Lane, Sequence[Tensors]], op: Op, what: str) -> Tensors:
    microbatches = lanes.get(op.lane, ())
    if op.mb >= len(microbatches):
        raise OrderError(f"the step was given {what} of {len(microbatches)} microbatches for lane {op.lane}")
    return microbatches[op.mb]


def _tensors(returned: object, op: Op) -> Tensors:
    outputs = (returned,) if isinstance(returned, Tensor) else returned
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(output, Tensor) for output in outputs):
        raise OrderError(f"a stage returns a tensor or a tuple of tensors; at {op} it returned {_kind(returned)}")
    return tuple(outputs)


def _kind(value: object) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
