"""Stages that are plain modules: the data of a step, and how the interpreter runs their forwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from dualpipe.errors import StageError
from dualpipe.runtime.live import Tensors
from dualpipe.runtime.overlap import Forwards, run_overlapped
from dualpipe.schedule import Chunk, Lane, Op, Schedule

Stages = Mapping[Chunk, nn.Module]


class Criterion(Protocol):
    """``criterion(*outputs, *labels)``: a scalar loss, scaled as its gradient should be."""

    def __call__(self, *tensors: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Feed:
    """The data of one step on one rank.

    ``inputs[lane][mb]`` are the tensors of a microbatch for stage 0 (needed where the rank holds stage 0 of the
    lane), ``labels[lane][mb]`` those for the criterion (needed where it holds the last stage): a tensor or a tuple of
    them, for exactly the schedule's number of microbatches.  Data of a lane that neither begins nor ends on the rank
    is not used.  All microbatches have the same shapes, unless the pipeline has ``variable_shapes``.  For bitwise
    reproducibility their tensors are contiguous, in aligned storage.
    """

    inputs: Mapping[Lane, Sequence[Tensors | Tensor]]
    labels: Mapping[Lane, Sequence[Tensors | Tensor]]

    def require(self, schedule: Schedule, rank: int, labels: bool = True) -> None:
        """Raise ``StageError`` unless ``rank`` has its data for a step, with ``labels`` those for the criterion too."""
        for lane, route in schedule.routes.items():
            if route[0] == rank:
                _require_microbatches("inputs", self.inputs, lane, schedule.microbatches[lane])
            if route[-1] == rank and labels:
                _require_microbatches("labels", self.labels, lane, schedule.microbatches[lane])


@dataclass
class StepResult:
    """What a step returns on a rank: for each lane whose last stage it holds, the losses (detached scalars) by
    microbatch, and with ``keep_outputs`` the last stage's outputs."""

    losses: dict[Lane, dict[int, Tensor]] = field(default_factory=dict)
    outputs: dict[Lane, dict[int, Tensors]] = field(default_factory=dict)


@dataclass
class ModuleComputation:
    """Runs a step's forwards on plain modules and collects ``result``; a ``dualpipe.runtime.executor.Computation``."""

    schedule: Schedule
    stages: Stages
    criterion: Criterion | None
    feed: Feed
    keep_outputs: bool = False
    result: StepResult = field(default_factory=StepResult)

    def forward(self, op: Op, inputs: Tensors) -> Tensors:
        outputs = _tensors(self.stages[op.chunk](*self.inputs(op, inputs)), op)
        return self.end(op, outputs, self.loss(op, outputs)) if self.schedule.is_last(op) else outputs

    def around(self, op: Op) -> None:
        return None

    def overlap(self, forward: Op, inputs: Tensors, backward: Op, outputs: Tensors, gradients: Tensors) -> Tensors:
        last = self.schedule.is_last(forward)
        if last:
            self.require_criterion(forward)
        forwards = Forwards(
            self.stages[forward.chunk],
            self.inputs(forward, inputs),
            self.criterion if last else None,
            _data(self.feed.labels, forward) if last else (),
        )
        module, loss1 = self.stages[backward.chunk], self.schedule.is_last(backward)
        returned, loss = run_overlapped(forward, forwards, backward, module, outputs, gradients, loss1)
        found = _tensors(returned, forward)
        return self.end(forward, found, loss) if last else found

    def inputs(self, op: Op, inputs: Tensors) -> Tensors:
        return _data(self.feed.inputs, op) if self.schedule.is_first(op) else inputs

    def require_criterion(self, op: Op) -> None:
        if self.criterion is None and torch.is_grad_enabled():
            raise StageError("training needs a criterion where a lane ends", f"{op} has none", "pass one as criterion")

    def loss(self, op: Op, outputs: Tensors) -> object:
        """What the criterion returns; ``None`` in an evaluation without one."""
        self.require_criterion(op)
        return None if self.criterion is None else self.criterion(*outputs, *_data(self.feed.labels, op))

    def end(self, op: Op, outputs: Tensors, loss: object) -> Tensors:
        """End a forward of the last stage: the loss, or nothing in an evaluation without a criterion."""
        if self.keep_outputs:
            self.result.outputs.setdefault(op.lane, {})[op.mb] = tuple(output.detach() for output in outputs)
        if self.criterion is None:
            return ()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"at {op} it returned {describe(loss)}"
            raise StageError("the criterion must return a scalar tensor", got, "reduce it")
        self.result.losses.setdefault(op.lane, {})[op.mb] = loss.detach()
        return (loss,)


def _require_microbatches(what: str, lanes: Mapping[Lane, Sequence[Tensors | Tensor]], lane: Lane, count: int) -> None:
    rule = f"the {what} of a lane must be a sequence of as many microbatches as the schedule has"
    if not isinstance(lanes, Mapping):
        raise StageError(
            f"{what} must be a mapping from each lane to its microbatches", f"got {describe(lanes)}", "give a dict"
        )
    given = lanes.get(lane, ())
    if isinstance(given, Tensor):
        raise StageError(rule, f"lane {lane} has a tensor of shape {list(given.shape)}", f"cut it into {count}")
    if not isinstance(given, Sized):
        raise StageError(rule, f"lane {lane} has {describe(given)}", "put them in a list")
    if len(given) != count:
        raise StageError(
            rule,
            f"lane {lane} has {what} of {len(given)} microbatches for {count}",
            "give each lane that many, or generate the schedule for another number",
        )
    for mb, batch in enumerate(given):
        if not isinstance(batch, (Tensor, tuple, list)):
            raise StageError(
                "a microbatch must be a tensor or a tuple of tensors",
                f"microbatch {mb} of lane {lane} has {what} of type {type(batch).__name__}",
                "put the tensors in a tuple",
            )


def _data(lanes: Mapping[Lane, Sequence[Tensors | Tensor]], op: Op) -> Tensors:
    batch = lanes[op.lane][op.mb]
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def _tensors(returned: object, op: Op) -> Tensors:
    outputs = (returned,) if isinstance(returned, Tensor) else returned
    if not isinstance(outputs, (tuple, list)) or not all(isinstance(output, Tensor) for output in outputs):
        raise StageError(
            "a stage must return a tensor or a tuple of tensors",
            f"at {op} it returned {describe(returned)}",
            "return only tensors",
        )
    return tuple(outputs)


def describe(value: object) -> str:
    """What a stage or criterion returned, in an error: ``a tuple of Tensor, int``, ``a tensor of shape [3]``."""
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
