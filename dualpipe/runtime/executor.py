"""The interpreter: a loop over one rank's compiled program, with one small handler for each kind of step.

The order is in the schedule and nowhere else; ``dualpipe.runtime.program`` compiles it.  A slot of messages is posted
and not waited for; a compute op waits only for the receive it needs.  Where B and W of a microbatch share a slot the
backward is full; elsewhere linear layers defer their weight gradient to W (``dualpipe.runtime.weightgrad``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dualpipe.errors import RuleError, StageError
from dualpipe.runtime.boundary import Boundaries, Boundary, require_specs
from dualpipe.runtime.live import Live, Output, Tensors, leaf_of
from dualpipe.runtime.program import PAIR, Overlaps, Pair, Post, Program, Step, compile_program
from dualpipe.runtime.split_stage import SplitStage
from dualpipe.runtime.transport import Message, MessageError, Transport
from dualpipe.runtime.weightgrad import DeferredGradients, WeightGradError, run_backward
from dualpipe.schedule import SF, B, Chunk, F, Op, Schedule, Slot, W, show_slot
from dualpipe.schedule.shapes import EXCHANGE

Observer = Callable[[Slot, Op, float, float], None]
"""Called after each op with its slot and when it began and ended, in seconds of ``time.monotonic``.

A message op lasts as long as it takes to post its slot.  The W of a full backward is part of its B and takes no time.
The F and B of an F&B pair have the same times.  On a GPU it is the time to launch the work."""


class StepError(RuntimeError):
    """A step that could not go on: the rank, slot and op, and what it was waiting for or what was missing."""

    def __init__(
        self, rank: int, number: int, slot: Slot | None, op: Op | None, reason: str, beside: Op | None = None
    ) -> None:
        self.rank, self.slot, self.op, self.reason = rank, number, op, reason
        ops = tuple([each for each in (op, beside) if each is not None])
        super().__init__(f"{describe_place(rank, number, slot, ops)}: {reason}")


def describe_place(rank: int, number: int, slot: Slot | None, ops: Slot) -> str:
    """Where a rank stopped; no slot means after the last one, or with a negative number outside a step.

    ``ops`` are those that it was running: both of an F&B pair, else the first one of a message slot.
    """
    elsewhere = "between steps" if number < 0 else "after its last slot"
    where = elsewhere if slot is None else f"in slot {number} ({show_slot(slot)})"
    return f"rank {rank} stopped {where}" + (f" at {' beside '.join(map(str, ops))}" if slot and len(slot) > 1 else "")


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

    def around(self, op: Op) -> AbstractContextManager[object] | None:
        """Entered around the work of the B or W ``op``; ``None`` if there is nothing to enter."""


class Overlap(Protocol):
    """Runs an F and a B of another chunk at once."""

    def __call__(self, forward: Op, inputs: Tensors, backward: Op, outputs: Tensors, gradients: Tensors) -> Tensors:
        """Run ``Computation.forward`` of the F on its ``inputs``, and the backward of ``outputs``, which have a graph.

        On the last stage the only output is the loss, and there are no ``gradients``; elsewhere there is one for each.
        """


_Key = tuple[int, bool, Overlaps]
_PROGRAMS: MutableMapping[Schedule, dict[_Key, Program]] = WeakIdKeyDictionary()


def program_of(schedule: Schedule, rank: int, forward_only: bool, overlaps: Overlaps = frozenset()) -> Program:
    """The compiled program of a rank, compiled once for each schedule value."""
    programs, key = _PROGRAMS.setdefault(schedule, {}), (rank, forward_only, overlaps)
    if key not in programs:
        programs[key] = compile_program(schedule, *key)
    return programs[key]


class Executor:
    """One run of one rank's program.

    ``dualpipe.pipeline.Pipeline`` explains the parameters.  ``splits`` has the chunks whose backward may be split.
    ``overlaps`` says for chunks (of F, of B) how to run their F&B pairs; all others run F, then B.  ``warned`` collects
    the chunks that a warning has named; pass the same set at every step to be warned once.
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
        overlaps: Mapping[tuple[Chunk, Chunk], Overlap] | None = None,
    ) -> None:
        require_size(schedule, transport)
        self.overlaps = overlaps or {}
        self.program = program_of(schedule, transport.rank, forward_only, frozenset(self.overlaps))
        self.computation = computation
        self.transport, self.store, self.splits = transport, store, splits
        self.forward_only, self.blocking, self.observer = forward_only, blocking, observe
        self.warned = set() if warned is None else warned
        self.waiting: Slot = ()
        """The op of an F&B pair that waits for its message."""
        self.values: list[Any] = [None] * len(self.program.registers)  # the registers of dualpipe.runtime.program
        self.boundaries = Boundaries(boundary)

    def run(self) -> None:
        """Run the program; gradients are added to the parameters.

        With ``forward_only`` only the forwards and their messages are run, without autograd.  The caller has entered a
        phase of the transport, which an error spoils.  Raises ``StepError``.  An error of a stage is raised as it is,
        with the place as a note.  Deferred weight gradients of a step that failed are dropped.  Raises ``StageError``
        for training in inference mode.
        """
        if not self.forward_only and torch.is_inference_mode_enabled():
            raise StageError(
                "training needs autograd",
                "the step was called within torch.inference_mode()",
                "call it outside, or evaluate with forward_only",
            )
        for split in self.splits.values():
            split.begin()
        handlers: dict[str, Callable[[Any], None]] = {
            SF: self.post,
            EXCHANGE: self.exchange,
            F: self.forward,
            B: self.backward,
            W: self.weight,
            PAIR: self.pair,
        }
        observed = self.observer is not None
        step: Step | Pair | None = None
        try:
            with torch.set_grad_enabled(not self.forward_only):
                for step in self.program.steps:
                    if step.fault:
                        raise ProgramError(step.fault)
                    if observed:
                        self.observe(step, handlers[step.kind])
                    else:
                        handlers[step.kind](step)
                step = None
                self.finish()
        except BaseException as error:
            self.store.clear()
            rank, number = self.transport.rank, len(self.program.slots) if step is None else step.number
            slot = None if step is None else step.slot
            ops = () if step is None else step.ops[: 2 if isinstance(step, Pair) else 1]
            op, *beside = self.waiting or ops or (None,)
            if isinstance(error, (MessageError, ProgramError, WeightGradError)):
                raise StepError(rank, number, slot, op, str(error), *beside) from error
            if isinstance(error, Exception):  # a stage's own
                error.add_note(describe_place(rank, number, slot, self.waiting or ops))
                if "leaf Variable that requires grad" in str(error):
                    error.add_note("a stage must not write to its inputs, which are leaves of autograd: clone them")
            raise

    def observe(self, step: Step | Pair, handler: Callable[[Any], None]) -> None:
        """Run a step and notify the observer of its ops."""
        began = time.monotonic()
        handler(step)
        ended = time.monotonic()
        if self.observer is not None:
            for op in step.ops:
                self.observer(step.slot, op, began, ended)

    def post(self, step: Step) -> None:
        messages = [self.send(post) if post.sends else self.receive(post) for post in step.posts]
        self.transport.post(messages)
        if self.blocking:
            for message in messages:
                self.transport.wait(message)

    def exchange(self, step: Step) -> None:
        """Exchange the shapes of the next slot's activations."""
        self.boundaries.exchange(step.posts, self.output, self.transport)

    def output(self, post: Post) -> Tensors:
        """The tensors of a send, which its register holds."""
        output: Output = self.values[post.register]
        return output.unchanged(post.op, post.producer)

    def send(self, post: Post) -> Message:
        """The message of a send; the output's register holds it until its echo arrives."""
        tensors = self.output(post)
        require_specs(post.op, tensors, self.boundaries.specs(post))
        shape = self.boundaries.shapes_of(post)
        self.values[post.register] = message = Message(post.label, post.peer, True, tensors, shape=shape)
        return message

    def receive(self, post: Post) -> Message:
        specs = self.boundaries.specs(post)
        self.values[post.register] = message = Message(post.label, post.peer, False, (), specs)
        return message

    def taken(self, step: Step) -> Tensors:
        """What the op needs from another stage.  Waits if a message brings it."""
        values = self.values
        value, values[step.source] = values[step.source], None
        if not step.received:
            output: Output = value
            return output.unchanged(step.op, step.producer)
        if step.echoes:
            sent = [values[register] for register in step.echoes]
            value.proves = [*[message.shape for message in sent if message.shape is not None], *sent]
            for register in step.echoes:
                values[register] = None
        return tuple(self.transport.wait(value))

    def forward(self, step: Step) -> None:
        op = step.op
        inputs = self.inputs(step)
        split = None if self.forward_only else self.splits.get(step.chunk)
        if split is None:
            outputs = self.computation.forward(op, inputs)
        else:
            with split.forward(step.weight, not step.full):
                outputs = self.computation.forward(op, inputs)
        self.end_forward(step, split, inputs, outputs)

    def inputs(self, step: Step) -> Tensors:
        return () if step.source < 0 else tuple([leaf_of(tensor) for tensor in self.taken(step)])

    def end_forward(self, step: Step, split: SplitStage | None, inputs: Tensors, outputs: Tensors) -> None:
        """Keep what an F returned for its B and for the next stage."""
        if not self.forward_only:
            live = Live.of_loss(step.op, inputs, outputs) if step.last else Live.of(inputs, outputs)
            self.values[step.live] = live._replace(outputs=outputs) if step.paired else live
            if split is not None and not split.learned:
                split.learn(edge.node for edge in live.roots if edge is not None)
        if not step.last:
            self.values[step.target] = Output.of([output.detach() for output in outputs])

    def backward(self, step: Step) -> None:
        live: Live = self.values[step.live]
        self.values[step.live] = None
        roots, seeds = live.roots_of(live.seeds or self.taken(step))
        with self.deferring(step):
            if roots:  # a frozen stage whose input needs no gradient has nothing to do
                around = self.computation.around(step.op)
                if around is None:
                    run_backward(roots, seeds)
                else:
                    with around:
                        run_backward(roots, seeds)
        self.end_backward(step, live)

    def deferring(self, step: Step) -> AbstractContextManager[None]:
        """A context in which to run a B: unless the backward is full, its weight gradients are deferred."""
        split, key, deferring = self.splits.get(step.chunk), step.weight, not step.full
        return self.store.deferring_to(key if deferring else None) if split is None else split.backward(key, deferring)

    def end_backward(self, step: Step, live: Live) -> None:
        if step.target >= 0:
            self.values[step.target] = Output.of(live.gradients(step.op, self.warned))

    def pair(self, pair: Pair) -> None:
        """Run an F and a B at once: wait for what both need, then run both as ``overlaps`` says."""
        f, b = pair.forward, pair.backward
        self.waiting = (f.op,)
        inputs = self.inputs(f)
        self.waiting = (b.op,)
        live: Live = self.values[b.live]
        self.values[b.live] = None
        gradients = () if live.seeds else live.roots_of(self.taken(b))[1]
        self.waiting = ()
        split = self.splits.get(f.chunk)
        with ExitStack() as stack:
            if split is not None:
                stack.enter_context(split.forward(f.weight, not f.full))
            stack.enter_context(self.deferring(b))
            around = self.computation.around(b.op)
            if around is not None:
                stack.enter_context(around)
            if live.differentiated:
                outputs = self.overlaps[f.chunk, b.chunk](f.op, inputs, b.op, live.differentiated, gradients)
            else:  # a frozen stage whose input needs no gradient: its B has nothing to do
                outputs = self.computation.forward(f.op, inputs)
        self.end_backward(b, live)
        self.end_forward(f, split, inputs, outputs)

    def weight(self, step: Step) -> None:
        around = self.computation.around(step.op)
        if around is not None:
            with around:
                if not step.full:
                    self.store.run(step.weight)
        elif not step.full:
            self.store.run(step.weight)

    def finish(self) -> None:
        """End the step: all messages completed, all weight gradients computed, every result used."""
        if self.program.left:
            raise ProgramError("; ".join(self.program.left))
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
