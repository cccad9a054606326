"""The interpreter: runs one rank's slots, one small handler per kind of op.

The order is in the schedule and nowhere else.  A message slot is posted and not waited for; a compute op waits only
for the receive it needs.  Where B and W of a microbatch share a slot the backward is whole; elsewhere linear layers
leave their weight gradient to W (``dualpipe.runtime.weightgrad``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualpipe.errors import RuleError, StageError
from dualpipe.runtime.split_linear import SplitStage
from dualpipe.runtime.transport import Message, MessageError, TensorSpec, Transport
from dualpipe.runtime.weightgrad import WeightGradError, WeightGradStore
from dualpipe.schedule import (
    MESSAGES,
    RB,
    RF,
    SENDS,
    SF,
    B,
    F,
    Kind,
    Lane,
    Op,
    Schedule,
    Slot,
    Task,
    W,
    full_backwards,
    show_slot,
)

logger = logging.getLogger(__name__)

Tensors = tuple[Tensor, ...]
Boundary = Callable[[int], Sequence[TensorSpec]]
Observer = Callable[[Slot, Op, float, float], None]
"""Called after each op with its slot and when it began and ended, in seconds of ``time.monotonic``.

A message op lasts as long as it takes to post its slot; the W of a whole backward is part of its B and lasts no time.
On a GPU it is the time to launch the work."""


class _Facts(NamedTuple):
    """What follows of an op from the schedule alone."""

    task: Task
    label: str
    peer: int | None


class StepError(RuntimeError):
    """A step that could not go on: the rank, slot and op, and what it was waiting for or found missing."""

    def __init__(self, rank: int, number: int, slot: Slot | None, op: Op | None, reason: str) -> None:
        self.rank, self.slot, self.op, self.reason = rank, number, op, reason
        super().__init__(f"{place(rank, number, slot, op)}: {reason}")


def place(rank: int, number: int, slot: Slot | None, op: Op | None) -> str:
    """Where a rank stopped, in words; no slot means after the last one, or with a negative number outside a step."""
    elsewhere = "between steps" if number < 0 else "after its last slot"
    where = elsewhere if slot is None else f"in slot {number} ({show_slot(slot)})"
    return f"rank {rank} stopped {where}" + (f" at {op}" if slot and len(slot) > 1 else "")


class OrderError(RuntimeError):
    """The schedule asks for an op before what it needs."""


class Computation(Protocol):
    """What the interpreter asks of the stages that a rank holds; it knows nothing else of a model.

    ``dualpipe.runtime.modules`` answers for plain modules, ``dualpipe.megatron`` for Megatron's.
    """

    def forward(self, op: Op, inputs: Tensors) -> Tensors:
        """Run the F ``op``.

        ``inputs`` came from the previous stage, as leaves that collect the gradient; the first stage gets none and
        reads its data.  Returns what goes to the next stage; on the last stage what B starts from, the loss (a
        scalar).  In an evaluation what the last stage returns is ignored.
        """

    def around(self, op: Op) -> AbstractContextManager[object]:
        """Entered around the work of the B or W ``op``."""


@dataclass(frozen=True)
class Worker:
    """What one rank brings to a schedule, the same for every step; ``dualpipe.pipeline.Pipeline`` explains each."""

    schedule: Schedule
    boundary: Boundary
    transport: Transport
    store: WeightGradStore
    splits: Mapping[tuple[Lane, int], SplitStage] = field(default_factory=dict)
    blocking: bool = False
    observe: Observer | None = None
    warned: set[tuple[Lane, int]] = field(default_factory=set)
    _facts: dict[Op, _Facts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.transport.ranks != self.schedule.ranks:
            raise RuleError(
                "a schedule runs on as many processes as it has ranks",
                f"the schedule has {self.schedule.ranks} and the process group {self.transport.ranks}",
                "generate it for the group's size",
            )

    def facts(self, op: Op) -> _Facts:
        """Worked out once: every step runs the same ops."""
        known = self._facts.get(op)
        if known is None:
            peer = self.schedule.peer(op) if op.kind in MESSAGES else None
            known = self._facts[op] = _Facts(op.task, str(op.bare), peer)
        return known


def run_step(worker: Worker, computation: Computation, forward_only: bool = False) -> None:
    """Run the rank's program once; gradients are added to the parameters.

    With ``forward_only`` only the forwards and their messages are run, without autograd.  The caller has entered a
    phase of the transport, which an error spoils.  Raises ``StepError``.  Weight gradients of a step that failed are
    dropped.
    """
    schedule = worker.schedule.only(frozenset({F, SF, RF})) if forward_only else worker.schedule
    with torch.set_grad_enabled(not forward_only):
        try:
            _Step(worker, schedule, computation).run()
        except BaseException:
            worker.store.clear()
            raise


class _Output(NamedTuple):
    """What an F or B has produced for another stage; ``versions`` count the writes to each tensor until then."""

    tensors: Tensors
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Tensors) -> _Output:
        return cls(tensors, tuple(tensor._version for tensor in tensors))


@dataclass
class _Live:
    """A microbatch between its F and its B: the leaves that B fills, and where B starts."""

    inputs: Tensors
    roots: tuple[GradientEdge | None, ...]
    seeds: Tensors = ()


class _Step:
    """The state of one step: what has arrived, what is live, what is to be sent."""

    def __init__(self, worker: Worker, schedule: Schedule, computation: Computation) -> None:
        self.worker, self.schedule, self.computation = worker, schedule, computation
        self.transport, self.store = worker.transport, worker.store
        self.program = schedule.programs[self.transport.rank]
        self.whole = {task for slot in self.program for task in full_backwards(slot)}
        self.live: dict[Task, _Live] = {}
        self.backward_done: set[Task] = set()
        self.activations: dict[Task, _Output] = {}
        self.gradients: dict[Task, _Output] = {}
        self.arrivals: dict[Op, Message] = {}
        for split in worker.splits.values():
            split.begin()
        self.handlers: dict[Kind, Callable[[Op, Task], None]] = {F: self.forward, B: self.backward, W: self.weight}

    def run(self) -> None:
        number, slot, op = 0, None, None
        try:
            for number, slot in enumerate(self.program):  # noqa: B007 # read where an error is told
                op = slot[0]
                began = time.monotonic()
                if op.kind in MESSAGES:
                    self.post(slot)
                    self.observe(slot, slot, began)
                else:
                    for op in slot:
                        self.handlers[op.kind](op, self.worker.facts(op).task)
                        began = self.observe(slot, (op,), began)
            number, slot, op = len(self.program), None, None
            self.finish()
        except (MessageError, OrderError, WeightGradError) as error:
            raise StepError(self.transport.rank, number, slot, op, str(error)) from error
        except Exception as error:  # the stages' own: it stays as it is, with the place added
            error.add_note(place(self.transport.rank, number, slot, op))
            raise

    def observe(self, slot: Slot, ops: Sequence[Op], began: float) -> float:
        """Tell the observer, if there is one, that these ops are over; returns when that was."""
        ended = time.monotonic()
        if self.worker.observe is not None:
            for op in ops:
                self.worker.observe(slot, op, began, ended)
        return ended

    def post(self, slot: Slot) -> None:
        messages = [self.message(op) for op in slot]
        self.transport.post(messages)
        if self.worker.blocking:
            for message in messages:
                self.transport.wait(message)

    def message(self, op: Op) -> Message:
        task, label, peer = self.worker.facts(op)
        if peer is None or not 0 <= peer < self.schedule.ranks or peer == self.transport.rank:
            raise OrderError(f"{op} has no other rank to go to: its peer would be {peer}")
        if op.kind in SENDS:
            ready, producer = (self.activations, F) if op.kind is SF else (self.gradients, B)
            tensors = _take(ready, task, op, producer)
            _require_specs(op, tensors, self.specs(op))
            return Message(label, peer, sends=True, tensors=tensors)
        if op.bare in self.arrivals:
            raise OrderError(f"{op} has been posted already")
        self.arrivals[op.bare] = received = Message(label, peer, sends=False, specs=self.specs(op))
        return received

    def specs(self, op: Op) -> list[TensorSpec]:
        """The tensors of a message: those of the boundary that it crosses, gradients for the floating ones alone."""
        crossed = op.stage if op.kind in (SF, RB) else op.stage - 1
        forwards = op.kind in (SF, RF)
        return [spec for spec in self.worker.boundary(crossed) if forwards or differentiable(spec.dtype)]

    def arrived(self, op: Op) -> Tensors:
        """What the receive ``op`` brought, waiting for it if need be."""
        message = self.arrivals.pop(op, None)
        if message is None:
            raise OrderError(f"it needs {op}, which has not been posted")
        return tuple(self.transport.wait(message))

    def forward(self, op: Op, task: Task) -> None:
        if task in self.live:
            raise OrderError(f"{op} has run already")
        inputs = self.inputs(op)
        trains = torch.is_grad_enabled()
        split = self.worker.splits.get((op.lane, op.stage)) if trains else None
        with nullcontext() if split is None else split.forward(task, task not in self.whole):
            outputs = self.computation.forward(op, inputs)
        if not trains:
            self.live[task] = _Live((), ())  # nothing to hold, but F has run
        elif self.schedule.is_last(op):
            (loss,) = outputs
            if not loss.requires_grad:
                raise StageError(
                    "training needs a loss with a gradient",
                    f"at {op} the loss depends on nothing that requires one (it is detached, or was computed without "
                    "autograd)",
                    "return the loss as it was computed, or evaluate with forward_only",
                )
            self.live[task] = _Live(inputs, (_edge(loss),), (torch.ones_like(loss),))
        else:
            self.live[task] = _Live(inputs, tuple(_edge(output) for output in outputs if differentiable(output.dtype)))
        if split is not None and not split.learned:
            split.learn(edge.node for edge in self.live[task].roots if edge is not None)
        if not self.schedule.is_last(op):
            self.activations[task] = _Output.of(tuple(output.detach() for output in outputs))

    def inputs(self, op: Op) -> Tensors:
        if self.schedule.is_first(op):
            return ()
        (need,) = self.schedule.needs(op)
        tensors = _take(self.activations, need.task, op, F) if need.kind is F else self.arrived(need)
        return tuple(_leaf(tensor) for tensor in tensors)

    def backward(self, op: Op, task: Task) -> None:
        if task not in self.live:
            raise OrderError(f"its F has not run, or {op} already has")
        seeds = self.live[task].seeds or self.output_gradients(op)
        live = self.live.pop(task)
        self.backward_done.add(task)
        pairs = [(root, seed) for root, seed in zip(live.roots, seeds, strict=True) if root is not None]
        split = self.worker.splits.get((op.lane, op.stage))
        apart = None if task in self.whole else task
        with self.store.collecting(apart) if split is None else split.backward(task, apart is not None):
            if pairs:  # a frozen stage whose input needs no gradient has nothing to do
                with self.computation.around(op):
                    torch.autograd.backward([root for root, _ in pairs], [seed for _, seed in pairs])
        if not self.schedule.is_first(op):
            self.gradients[task] = _Output.of(self.input_gradients(op, live.inputs))

    def input_gradients(self, op: Op, inputs: Tensors) -> Tensors:
        """The gradients of a stage's inputs; zeros for an input that the stage did not use: the peer expects a message.

        Autograd in one process would leave the gradients before it ``None``, which an optimizer may treat otherwise.
        """
        leaves = [leaf for leaf in inputs if differentiable(leaf.dtype)]
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        missing = [number for number, gradient in enumerate(gradients) if gradient is None]
        if missing and len(missing) == len(leaves):
            raise StageError(
                "a stage passes a gradient on to the stage before it",
                f"at {op} its output does not depend on its input (which is detached, or used without autograd)",
                "leave the input in the graph, or train only the stages after it",
            )
        if missing and (op.lane, op.stage) not in self.worker.warned:
            self.worker.warned.add((op.lane, op.stage))
            logger.warning(
                "dualpipe: stage %s of lane %s does not use its inputs %s at %s; the stage before gets zeros for their "
                "gradients, where autograd in one process would leave None",
                op.stage, op.lane, missing, op,
            )  # fmt: skip
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))

    def output_gradients(self, op: Op) -> Tensors:
        _, need = self.schedule.needs(op)
        return _take(self.gradients, need.task, op, B) if need.kind is B else self.arrived(need)

    def weight(self, op: Op, task: Task) -> None:
        with self.computation.around(op):
            if task in self.whole and task in self.backward_done:
                self.whole.remove(task)  # B of the same slot has done it; a second W will find nothing
            else:
                self.store.run(task)

    def finish(self) -> None:
        """The end of a step: every message over, every weight gradient computed, nothing left live."""
        left = [*(f"the output of {Op(F, *task)} was not used" for task in self.activations)]
        left += [f"the gradient of {Op(B, *task)} was not used" for task in self.gradients]
        left += [f"what {op} receives was not used" for op in self.arrivals]
        left += [f"no backward came for {Op(F, *task)}" for task in self.live if torch.is_grad_enabled()]
        if left:
            raise OrderError("; ".join(left))
        self.transport.drain()
        self.store.require_empty()


def differentiable(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype have gradients, so that one is sent back."""
    return dtype.is_floating_point or dtype.is_complex


def _take(held: dict[Task, _Output], task: Task, op: Op, producer: Kind) -> Tensors:
    output = held.pop(task, None)
    if output is None:
        raise OrderError(f"{op} needs {Op(producer, *task)}, which has not run or was used already")
    if tuple(tensor._version for tensor in output.tensors) != output.versions:
        raise StageError(
            "what a stage returns stays as it is until it is used",
            f"{op} finds that the output of {Op(producer, *task)} was written to since",
            "return a new tensor for each microbatch, not a buffer that is used again",
        )
    return output.tensors


def _edge(output: Tensor) -> GradientEdge | None:
    """Where the backward of ``output`` starts.  It outlives the tensor, so a sent output (or the base of a view)
    is freed as soon as autograd itself has no use for it."""
    return get_gradient_edge(output) if output.requires_grad else None


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach()
    return leaf.requires_grad_() if torch.is_grad_enabled() and differentiable(leaf.dtype) else leaf


def _require_specs(op: Op, tensors: Tensors, specs: Sequence[TensorSpec]) -> None:
    found = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    if found != list(specs):
        raise OrderError(
            f"{op} sends {', '.join(map(str, found))} where the boundary was declared as "
            f"{', '.join(map(str, specs))}; declare the shapes that the stage really gives"
        )
