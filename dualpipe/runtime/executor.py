"""The interpreter: runs one rank's program, with one small handler for each kind of op.

The order is in the schedule and nowhere else.  A slot of messages is posted and not waited for; a compute op waits
only for the receive it needs.  Where B and W of a microbatch share a slot the backward is full; elsewhere linear layers
defer their weight gradient to W (``dualpipe.runtime.weightgrad``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualpipe.errors import RuleError, StageError
from dualpipe.runtime.split_stage import SplitStage
from dualpipe.runtime.transport import Message, MessageError, TensorSpec, Transport
from dualpipe.runtime.weightgrad import DeferredGradients, WeightGradError
from dualpipe.schedule import (
    MESSAGES,
    RB,
    RF,
    SENDS,
    SF,
    B,
    Chunk,
    F,
    Kind,
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

A message op lasts as long as it takes to post its slot.  The W of a full backward is part of its B and takes no time.
On a GPU it is the time to launch the work."""


class StepError(RuntimeError):
    """A step that could not go on: the rank, slot and op, and what it was waiting for or what was missing."""

    def __init__(self, rank: int, number: int, slot: Slot | None, op: Op | None, reason: str) -> None:
        self.rank, self.slot, self.op, self.reason = rank, number, op, reason
        super().__init__(f"{describe_place(rank, number, slot, op)}: {reason}")


def describe_place(rank: int, number: int, slot: Slot | None, op: Op | None) -> str:
    """Where a rank stopped; no slot means after the last one, or with a negative number outside a step."""
    elsewhere = "between steps" if number < 0 else "after its last slot"
    where = elsewhere if slot is None else f"in slot {number} ({show_slot(slot)})"
    return f"rank {rank} stopped {where}" + (f" at {op}" if slot and len(slot) > 1 else "")


class ProgramError(RuntimeError):
    """A program that cannot be run: an op before one it needs, an op twice, a message to nobody, a result not used."""


class Computation(Protocol):
    """What the interpreter needs from the stages that a rank holds; it knows nothing else of a model.

    ``dualpipe.runtime.modules`` implements it for plain modules, ``dualpipe.megatron`` for Megatron's.
    """

    def forward(self, op: Op, inputs: Tensors) -> Tensors:
        """Run the F ``op``.

        ``inputs`` are from the previous stage, as leaves that collect the gradient; the first stage gets none and
        reads its data.  Returns the tensors for the next stage; on the last stage the loss (a scalar), where B
        starts.  In an evaluation what the last stage returns is ignored.
        """

    def around(self, op: Op) -> AbstractContextManager[object]:
        """Entered around the work of the B or W ``op``."""


class _Output(NamedTuple):
    """The tensors that an F or B produced for another stage, with their versions (autograd's counts of writes)."""

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


class Executor:
    """One run of one rank's program: which receives are posted, which microbatches are live, what is to be sent.

    ``dualpipe.pipeline.Pipeline`` explains the parameters.  ``splits`` has the chunks whose backward may be split.
    ``warned`` collects the chunks that a warning has named; pass the same set at every step to be warned once.
    """

    def __init__(
        self,
        schedule: Schedule,
        computation: Computation,
        boundary: Boundary,
        transport: Transport,
        store: DeferredGradients,
        splits: Mapping[Chunk, SplitStage],
        *,
        forward_only: bool = False,
        blocking: bool = False,
        observe: Observer | None = None,
        warned: set[Chunk] | None = None,
    ) -> None:
        require_size(schedule, transport)
        self.schedule = schedule.only(frozenset({F, SF, RF})) if forward_only else schedule
        self.computation, self.boundary = computation, boundary
        self.transport, self.store, self.splits = transport, store, splits
        self.forward_only, self.blocking, self.observer = forward_only, blocking, observe
        self.warned = set() if warned is None else warned
        self.program = self.schedule.programs[transport.rank]
        self.full = {task for slot in self.program for task in full_backwards(slot)}
        self.live: dict[Task, _Live] = {}
        self.backward_done: set[Task] = set()
        self.activations: dict[Task, _Output] = {}
        self.gradients: dict[Task, _Output] = {}
        self.arrivals: dict[Op, Message] = {}
        self.handlers: dict[Kind, Callable[[Op, Task], None]] = {F: self.forward, B: self.backward, W: self.weight}

    def run(self) -> None:
        """Run the program; gradients are added to the parameters.

        With ``forward_only`` only the forwards and their messages are run, without autograd.  The caller has entered a
        phase of the transport, which an error spoils.  Raises ``StepError``.  An error of a stage is raised as it is,
        with the place as a note.  Deferred weight gradients of a step that failed are dropped.
        """
        for split in self.splits.values():
            split.begin()
        number, slot, op = 0, None, None
        try:
            with torch.set_grad_enabled(not self.forward_only):
                for number, slot in enumerate(self.program):  # noqa: B007 # the handlers below read it
                    op = slot[0]
                    began = time.monotonic()
                    if op.kind in MESSAGES:
                        self.post(slot)
                        self.observe(slot, slot, began)
                    else:
                        for op in slot:
                            self.handlers[op.kind](op, op.task)
                            began = self.observe(slot, (op,), began)
                number, slot, op = len(self.program), None, None
                self.finish()
        except BaseException as error:
            self.store.clear()
            if isinstance(error, (MessageError, ProgramError, WeightGradError)):
                raise StepError(self.transport.rank, number, slot, op, str(error)) from error
            if isinstance(error, Exception):  # a stage's own
                error.add_note(describe_place(self.transport.rank, number, slot, op))
            raise

    def observe(self, slot: Slot, ops: Sequence[Op], began: float) -> float:
        """Notify the observer, if there is one, that these ops have ended; returns when they did."""
        ended = time.monotonic()
        if self.observer is not None:
            for op in ops:
                self.observer(slot, op, began, ended)
        return ended

    def post(self, slot: Slot) -> None:
        messages = [self.message(op) for op in slot]
        self.transport.post(messages)
        if self.blocking:
            for message in messages:
                self.transport.wait(message)

    def message(self, op: Op) -> Message:
        peer = self.schedule.peer(op)
        if peer is None or not 0 <= peer < self.schedule.ranks or peer == self.transport.rank:
            raise ProgramError(f"{op} has no other rank to go to: its peer would be {peer}")
        label = str(op.bare)
        if op.kind in SENDS:
            ready, producer = (self.activations, F) if op.kind is SF else (self.gradients, B)
            tensors = _take(ready, op.task, op, producer)
            _require_specs(op, tensors, self.specs(op))
            return Message(label, peer, sends=True, tensors=tensors)
        if op.bare in self.arrivals:
            raise ProgramError(f"{op} has been posted already")
        self.arrivals[op.bare] = receive = Message(label, peer, sends=False, specs=self.specs(op))
        return receive

    def specs(self, op: Op) -> list[TensorSpec]:
        """The tensors of a message: those of the boundary that it crosses, gradients for the floating ones alone."""
        crossed = op.stage if op.kind in (SF, RB) else op.stage - 1
        forwards = op.kind in (SF, RF)
        return [spec for spec in self.boundary(crossed) if forwards or differentiable(spec.dtype)]

    def received(self, op: Op) -> Tensors:
        """The tensors of the receive ``op``; waits for it if need be."""
        message = self.arrivals.pop(op, None)
        if message is None:
            raise ProgramError(f"it needs {op}, which has not been posted")
        return tuple(self.transport.wait(message))

    def forward(self, op: Op, task: Task) -> None:
        if task in self.live:
            raise ProgramError(f"{op} has run already")
        inputs = self.inputs(op)
        split = None if self.forward_only else self.splits.get(op.chunk)
        with nullcontext() if split is None else split.forward(Op(W, *task), task not in self.full):
            outputs = self.computation.forward(op, inputs)
        last = self.schedule.is_last(op)
        if self.forward_only:
            self.live[task] = _Live((), ())  # nothing to hold, but F has run
        elif last:
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
        if not last:
            self.activations[task] = _Output.of(tuple(output.detach() for output in outputs))

    def inputs(self, op: Op) -> Tensors:
        if self.schedule.is_first(op):
            return ()
        (need,) = self.schedule.needs(op)
        tensors = _take(self.activations, need.task, op, F) if need.kind is F else self.received(need)
        return tuple(_leaf(tensor) for tensor in tensors)

    def backward(self, op: Op, task: Task) -> None:
        if task not in self.live:
            raise ProgramError(f"its F has not run, or {op} already has")
        seeds = self.live[task].seeds or self.output_gradients(op)
        live = self.live.pop(task)
        self.backward_done.add(task)
        pairs = [(root, seed) for root, seed in zip(live.roots, seeds, strict=True) if root is not None]
        split, deferring, key = self.splits.get(op.chunk), task not in self.full, Op(W, *task)
        with self.store.deferring_to(key if deferring else None) if split is None else split.backward(key, deferring):
            if pairs:  # a frozen stage whose input needs no gradient has nothing to do
                with self.computation.around(op):
                    torch.autograd.backward([root for root, _ in pairs], [seed for _, seed in pairs])
        if not self.schedule.is_first(op):
            self.gradients[task] = _Output.of(self.input_gradients(op, live.inputs))

    def input_gradients(self, op: Op, inputs: Tensors) -> Tensors:
        """The gradients of a stage's inputs, with zeros for an input that the stage did not use: the peer expects one.

        Autograd in one process would leave the gradients before it ``None``, which an optimizer may treat differently.
        """
        leaves = [leaf for leaf in inputs if differentiable(leaf.dtype)]
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        missing = [number for number, gradient in enumerate(gradients) if gradient is None]
        if missing and len(missing) == len(leaves):
            raise StageError(
                "a stage must pass a gradient on to the stage before it",
                f"at {op} its output does not depend on its input (which is detached, or used without autograd)",
                "leave the input in the graph, or train only the stages after it",
            )
        if missing and op.chunk not in self.warned:
            self.warned.add(op.chunk)
            logger.warning(
                "dualpipe: %s does not use its inputs %s at %s; the stage before gets zeros for their gradients, where "
                "autograd in one process would leave None",
                op.chunk, missing, op,
            )  # fmt: skip
        return tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))

    def output_gradients(self, op: Op) -> Tensors:
        _, need = self.schedule.needs(op)
        return _take(self.gradients, need.task, op, B) if need.kind is B else self.received(need)

    def weight(self, op: Op, task: Task) -> None:
        with self.computation.around(op):
            if task in self.full and task in self.backward_done:
                self.full.remove(task)  # B of the same slot has done it; a second W finds nothing deferred
            else:
                self.store.run(Op(W, *task))

    def finish(self) -> None:
        """End the step: all messages completed, all weight gradients computed, every result used."""
        left = [*(f"the output of {Op(F, *task)} was not used" for task in self.activations)]
        left += [f"the gradient of {Op(B, *task)} was not used" for task in self.gradients]
        left += [f"what {op} receives was not used" for op in self.arrivals]
        left += [f"{Op(F, *task)} has no backward" for task in self.live if not self.forward_only]
        if left:
            raise ProgramError("; ".join(left))
        self.transport.drain()
        self.store.require_empty()


def require_size(schedule: Schedule, transport: Transport) -> None:
    """Raise ``RuleError`` unless the schedule has as many ranks as the transport."""
    if transport.ranks != schedule.ranks:
        raise RuleError(
            "a schedule must run on as many processes as it has ranks",
            f"the schedule has {schedule.ranks} and the process group {transport.ranks}",
            "generate it for the group's size",
        )


def differentiable(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype have gradients, so that one is sent back."""
    return dtype.is_floating_point or dtype.is_complex


def _take(outputs: dict[Task, _Output], task: Task, op: Op, producer: Kind) -> Tensors:
    output = outputs.pop(task, None)
    if output is None:
        raise ProgramError(f"{op} needs {Op(producer, *task)}, which has not run or was used already")
    if tuple(tensor._version for tensor in output.tensors) != output.versions:
        raise StageError(
            "a stage must not write to what it returned until that is used",
            f"{op} finds that the output of {Op(producer, *task)} was written to since",
            "return a new tensor for each microbatch, not a buffer that is used again",
        )
    return output.tensors


def _edge(output: Tensor) -> GradientEdge | None:
    """Where the backward of ``output`` starts.  It outlives the tensor, so a sent output (or the base of a view)
    is freed as soon as autograd itself no longer needs it."""
    return get_gradient_edge(output) if output.requires_grad else None


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach()
    return leaf.requires_grad_() if torch.is_grad_enabled() and differentiable(leaf.dtype) else leaf


def _require_specs(op: Op, tensors: Tensors, specs: Sequence[TensorSpec]) -> None:
    """Raise ``StageError`` unless a stage gives the tensors that the boundary declares."""
    found = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    if found != list(specs):
        raise StageError(
            "a stage must return the tensors that its boundary declares",
            f"{op} sends {', '.join(map(str, found))} where the boundary is {', '.join(map(str, specs))}",
            "declare the shapes and dtypes that the stage returns",
        )
