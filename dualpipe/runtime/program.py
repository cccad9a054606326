"""A rank's program, compiled: what each op reads and writes is looked up once, not at each op of each step.

A *register* holds one value from the op that writes it to the one op that reads and clears it::

    register of   holds                                     written by   read by
    F             a stage's output for the next stage       F            SF, or F of the next stage on this rank
    B             the gradient of a stage's input           B            SB, or B of the previous stage on this rank
    RF, RB        a receive that was posted                 its slot     F, B
    W             a microbatch between its F and its B      F            B

After its SF or SB the register of an F or B holds the message until its *echo* arrives: the first message that the
peer posts after the compute that needs ours, which proves that ours has been received.

The result depends only on the schedule, and ``Program.slots`` gives the slots back.  An op that cannot be run
because what it needs is not there has a ``fault``: the reason, with which a step ends when it reaches the op.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from dualpipe.runtime.echoes import find_echoes
from dualpipe.schedule import (
    COLLECTIVES,
    MESSAGES,
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
    overlapped_pairs,
    show_slot,
)
from dualpipe.schedule.shapes import EXCHANGE

NONE = -1
"""No register."""
PAIR: Final = "F&B"
"""The kind of a ``Pair``."""

Overlaps = frozenset[tuple[Chunk, Chunk]]
"""The chunks (of F, of B) whose F&B pairs run as one unit."""


@dataclass(frozen=True, slots=True)
class Post:
    """One message of a slot."""

    op: Op
    label: str
    peer: int
    sends: bool
    register: int
    """Whose value is sent, or that gets the receive."""
    crossed: int
    """The stage before the boundary that the message crosses."""
    forwards: bool
    """Whether it carries activations; otherwise gradients."""
    producer: Op
    """What computes a send."""


@dataclass(frozen=True, slots=True)
class Step:
    """A compute op, or all messages of a slot."""

    number: int
    slot: Slot
    op: Op
    kind: Kind
    """F, B or W; SF for messages of any kind; AR for the exchange of shapes before them."""
    task: Task
    chunk: Chunk
    weight: Op
    """The W of the task, which is its key in the store of deferred weight gradients."""
    fault: str
    posts: tuple[Post, ...] = ()
    """The messages of a slot; of an exchange the activations whose shapes are exchanged."""
    source: int = NONE
    """The register of what comes from another stage."""
    received: bool = False
    """Whether that is a message."""
    producer: Op | None = None
    """Otherwise the op on this rank that computed it."""
    echoes: tuple[int, ...] = ()
    """The registers of the sends that have been received once the message has arrived."""
    target: int = NONE
    """The register for another stage."""
    live: int = NONE
    last: bool = False
    full: bool = False
    """Whether B and W share a slot, after which W has nothing to do."""
    paired: bool = False
    """Whether this is an F whose B is in a ``Pair``, which needs the outputs of the stage."""

    @property
    def ops(self) -> Slot:
        if self.kind is EXCHANGE:
            return self.slot
        return tuple([post.op for post in self.posts]) or (self.op,)


@dataclass(frozen=True, slots=True)
class Pair:
    """An F and a B of another chunk that run as one unit.

    Both wait for what they need before either begins.  That cannot delay another rank: what they compute is sent in
    later slots, with or without the overlap.
    """

    forward: Step
    backward: Step
    kind: Final = PAIR

    @property
    def number(self) -> int:
        return self.forward.number

    @property
    def slot(self) -> Slot:
        return self.forward.slot

    @property
    def ops(self) -> Slot:
        return (self.forward.op, self.backward.op)

    @property
    def fault(self) -> str:
        return self.forward.fault or self.backward.fault


@dataclass(frozen=True)
class Program:
    """The steps of one rank; ``left`` says what none of them uses."""

    rank: int
    steps: tuple[Step | Pair, ...]
    registers: tuple[Op, ...]
    """For each register the op after which it is named."""
    left: tuple[str, ...]

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The slots that the steps run, in order."""
        found: dict[int, list[Op]] = defaultdict(list)
        for step in self.steps:
            found[step.number] += step.ops
        return tuple(tuple(ops) for _, ops in sorted(found.items()))


def compile_program(
    schedule: Schedule, rank: int, forward_only: bool = False, overlaps: Overlaps = frozenset()
) -> Program:
    """The program of ``rank``; with ``forward_only`` only its forwards and their messages."""
    if forward_only:
        schedule = schedule.only(frozenset({F, SF, RF, EXCHANGE}))
    return _Compiler(schedule, rank, forward_only, overlaps).compile()


class _Compiler:
    """Goes through a rank's program once and remembers which register holds what."""

    def __init__(self, schedule: Schedule, rank: int, forward_only: bool, overlaps: Overlaps) -> None:
        self.schedule, self.rank, self.forward_only, self.overlaps = schedule, rank, forward_only, overlaps
        self.program = schedule.programs[rank]
        self.paired = {b.task for slot in self.program for _, b in self.pairs(slot)}
        self.registers: dict[Op, int] = {}
        self.full = {task for slot in self.program for task in full_backwards(slot)}
        self.outputs: set[Op] = set()  # the F and B whose result was not used yet
        self.arrivals: set[Op] = set()  # the receives that are posted and not used yet
        self.sent: set[Op] = set()  # the F and B whose send is posted and was not echoed yet
        self.live: dict[Task, bool] = {}
        self.ended: set[Task] = set()

    def compile(self) -> Program:
        self.echoes = find_echoes(self.schedule, self.rank)
        steps: list[Step | Pair] = []
        for number, slot in enumerate(self.program):
            if slot[0].kind in COLLECTIVES:
                after = self.program[number + 1] if number + 1 < len(self.program) else ()
                if not after or after[0].kind not in MESSAGES:
                    steps.append(self.unknown(number, slot))
                continue
            if slot[0].kind not in MESSAGES:
                steps += self.units(number, slot)
                continue
            step = self.messages(number, slot)
            before = self.program[number - 1] if number else ()
            if before and before[0].kind in COLLECTIVES:
                steps.append(self.exchange(number - 1, before, step))
            steps.append(step)
        left = [f"the output of {op} was not used" for op in self.registers if op in self.outputs and op.kind is F]
        left += [f"the gradient of {op} was not used" for op in self.registers if op in self.outputs and op.kind is B]
        left += [f"what {op} receives was not used" for op in self.registers if op in self.arrivals]
        left += [f"{Op(F, *task)} has no backward" for task in self.live if not self.forward_only]
        return Program(self.rank, tuple(steps), tuple(self.registers), tuple(left))

    def register(self, op: Op) -> int:
        return self.registers.setdefault(op.bare, len(self.registers))

    def messages(self, number: int, slot: Slot) -> Step:
        posts, faults = [], []
        for op in slot:
            sends, forwards = op.kind in SENDS, op.kind in (SF, RF)
            peer = self.schedule.peer(op)
            producer = Op(F if forwards else B, *op.task)
            value = producer if sends else op.bare
            if peer is None or not 0 <= peer < self.schedule.ranks or peer == self.rank:
                faults.append(f"{op} has no other rank to go to: its peer would be {peer}")
            elif sends and value not in self.outputs:
                faults.append(_unused(op, value))
            elif not sends and value in self.arrivals:
                faults.append(f"{op} has been posted already")
            if sends:
                self.outputs.discard(value)
                self.sent.add(value)
            else:
                self.arrivals.add(value)
            crossed = op.stage if sends == forwards else op.stage - 1
            register, to = self.register(value), NONE if peer is None else peer
            posts.append(Post(op, str(op.bare), to, sends, register, crossed, forwards, producer))
        op = slot[0]
        fault = faults[0] if faults else ""
        return Step(number, slot, op, SF, op.task, op.chunk, Op(W, *op.task), fault, tuple(posts))

    def exchange(self, number: int, slot: Slot, step: Step) -> Step:
        """The exchange of the shapes of a slot's activations, before that slot."""
        posts = tuple(post for post in step.posts if post.forwards)
        known = [op.kind for op in slot] == [EXCHANGE] * len(posts)
        fault = "" if known else f"{show_slot(slot)} is not the exchange of the shapes of {show_slot(step.slot)}"
        return replace(step, number=number, slot=slot, op=slot[0], kind=EXCHANGE, fault=fault, posts=posts)

    def unknown(self, number: int, slot: Slot) -> Step:
        """A slot of collectives that no messages follow."""
        op = slot[0]
        fault = f"{show_slot(slot)} is not the exchange of the shapes of a slot of messages"
        return Step(number, slot, op, EXCHANGE, op.task, op.chunk, Op(W, *op.task), fault)

    def pairs(self, slot: Slot) -> list[tuple[Op, Op]]:
        return [(f, b) for f, b in overlapped_pairs(slot) if (f.chunk, b.chunk) in self.overlaps]

    def units(self, number: int, slot: Slot) -> Iterator[Step | Pair]:
        """The computes of a slot, with each F&B pair as one."""
        pairs = self.pairs(slot)
        steps = deque(self.computes(number, slot))
        while steps:
            step = steps.popleft()
            paired = steps and (step.op, steps[0].op) in pairs
            yield Pair(step, steps.popleft()) if paired else step

    def computes(self, number: int, slot: Slot) -> list[Step]:
        compilers = {F: self.forward, B: self.backward, W: self.weight}
        return [compilers[op.kind](number, slot, op, op.task) for op in slot]

    def forward(self, number: int, slot: Slot, op: Op, task: Task) -> Step:
        fault = f"{op} has run already" if task in self.live else ""
        step = self.compute(number, slot, op, fault, self.schedule.needs(op), self.schedule.is_last(op))
        self.live[task] = True
        return replace(step, paired=task in self.paired)

    def backward(self, number: int, slot: Slot, op: Op, task: Task) -> Step:
        fault = "" if self.live.pop(task, False) else f"its F has not run, or {op} already has"
        self.ended.add(task)
        return self.compute(number, slot, op, fault, self.schedule.needs(op)[1:], self.schedule.is_first(op))

    def compute(self, number: int, slot: Slot, op: Op, fault: str, needs: Iterable[Op], ends: bool) -> Step:
        """An F or B: what it takes from another stage, and unless the lane ``ends`` there what it leaves for one."""
        source, received, producer, echoes, missing = self.source(op, needs)
        target = NONE if ends else self.register(op)
        if not ends:
            self.outputs.add(op.bare)
        return Step(
            number,
            slot,
            op,
            op.kind,
            op.task,
            op.chunk,
            Op(W, *op.task),
            fault or missing,
            source=source,
            received=received,
            producer=producer,
            echoes=echoes,
            target=target,
            live=self.register(Op(W, *op.task)),
            last=self.schedule.is_last(op),
            full=op.task in self.full,
        )

    def weight(self, number: int, slot: Slot, op: Op, task: Task) -> Step:
        full = task in self.full and task in self.ended
        if full:
            self.full.discard(task)  # B of the same slot has done it; a second W finds nothing deferred
        return Step(number, slot, op, W, task, op.chunk, Op(W, *task), "", full=full)

    def source(self, op: Op, needs: Iterable[Op]) -> tuple[int, bool, Op | None, tuple[int, ...], str]:
        """Where ``op`` finds what comes from another stage: the register, whether it is a receive, else the op that
        computed it, the echoes, and why it is not there."""
        for need in needs:
            if need.kind in MESSAGES:
                missing = "" if need in self.arrivals else f"it needs {need}, which has not been posted"
                self.arrivals.discard(need)
                echoed = [sent for sent in self.echoes.get(need, ()) if sent in self.sent]
                self.sent.difference_update(echoed)
                return self.register(need), True, None, tuple(map(self.register, echoed)), missing
            missing = "" if need in self.outputs else _unused(op, need)
            self.outputs.discard(need)
            return self.register(need), False, need, (), missing
        return NONE, False, None, (), ""


def _unused(op: Op, producer: Op) -> str:
    return f"{op} needs {producer}, which has not run or was used already"
