"""One fake rank: its program as a generator that yields wherever it may have to wait."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from dualpipe.schedule import MESSAGES, RB, RECEIVES, RF, SB, SENDS, SF, Chunk, Kind, Lane, Op, Schedule, W
from reference.data import Batch
from reference.fault import Misstep
from reference.mailbox import Layout, Mailbox, Message
from reference.replica import Replica

Observer = Callable[[Op, nn.Module], None]


class Pause(NamedTuple):
    """Where a rank is (``op`` is ``None`` before its first slot and at its end), and which messages it waits for."""

    slot: int
    op: Op | None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Supply:
    """What every rank can look up in a step: each lane's microbatches, and the layout of each stage's output."""

    batches: Mapping[Lane, Sequence[Batch]]
    boundaries: Sequence[Layout]


class Rank:
    """One rank for one step.  ``losses`` collects the losses it computes, by lane and microbatch."""

    def __init__(
        self,
        number: int,
        schedule: Schedule,
        replicas: Mapping[Chunk, Replica],
        supply: Supply,
        mail: Mailbox,
        blocking: bool,
        observe: Observer | None,
    ) -> None:
        self.number, self.schedule, self.replicas = number, schedule, replicas
        self.supply, self.mail, self.blocking, self.observe = supply, mail, blocking, observe
        self.program = schedule.programs[number]
        self.losses: dict[tuple[Lane, int], Tensor] = {}
        self._slot = 0
        self._done: set[Op] = set()
        self._received: defaultdict[Op, list[Message]] = defaultdict(list)
        # Outputs of F and B for the neighbour stages, by the op that sends them, until their last use.
        self._produced: dict[Op, Tensor] = {}
        self._uses = Counter(op.bare for slot in self.program for op in slot if op.kind in SENDS or op.kind is W)

    def run(self) -> Iterator[Pause]:
        """Run the whole program.  Raises ``Misstep``."""
        posted: list[Message] = []
        for number, slot in enumerate(self.program):
            self._slot = number
            if slot[0].kind in MESSAGES:
                messages = [self._post(op) for op in slot]
                posted += messages
                yield Pause(number, slot[0], tuple(messages) if self.blocking else ())
            else:
                for op in slot:
                    yield Pause(number, op, self._arrivals(op))
                    self._compute(op)
        yield Pause(len(self.program), None, tuple(posted))

    # Messages.

    def _post(self, op: Op) -> Message:
        self._check_holds(op)
        message = Message(self.number, self._slot, op, self._peer(op), *self._content(op))
        if op.kind in RECEIVES:
            self._received[op.bare].append(message)
        self.mail.post(message)
        return message

    def _peer(self, op: Op) -> int:
        peer = self.schedule.peer(op)
        if peer is None or peer == self.number or not 0 <= peer < self.schedule.ranks:
            got = "the lane ends here" if peer is None else f"its peer is rank {peer} of {self.schedule.ranks}"
            fix = "name that rank or remove the op"
            raise self._misstep(op, "a message goes to another rank that exists", got, fix)
        return peer

    def _content(self, op: Op) -> tuple[Layout, Tensor | None]:
        """The layout of a message and, if it is a send, the payload."""
        if op.kind in RECEIVES:
            boundary = op.stage - 1 if op.kind is RF else op.stage
            if boundary < 0 or (op.kind is RB and self.schedule.is_last(op)):
                raise self._misstep(op, "a stage receives from a neighbour", "the lane ends here", "remove it")
            return self.supply.boundaries[boundary], None
        self._check_needs(op)
        if op.bare not in self._produced:
            raise self._misstep(op, "a stage sends to a neighbour", "the lane ends here", "remove it")
        payload = self._take(op.bare)
        return Layout.of(payload), payload

    # Computes.

    def _arrivals(self, op: Op) -> tuple[Message, ...]:
        """The receives that a compute op waits for."""
        self._check_holds(op)
        self._check_needs(op)
        return tuple(self._received[need][0] for need in self.schedule.needs(op) if need.kind in RECEIVES)

    def _compute(self, op: Op) -> None:
        if op in self._done and op.kind is not W:
            raise self._misstep(
                op,
                "F and B of a microbatch run once, since autograd frees the graph",
                "it has run already",
                "remove one",
            )
        replica = self.replicas[op.chunk]
        match op.kind:
            case Kind.F:
                self._forward(op, replica)
            case Kind.B:
                self._backward(op, replica)
            case Kind.W:
                self._uses[op] -= 1
                replica.weight(op.task, again=self._uses[op] > 0)
            case _:
                raise AssertionError(f"{op} is in a slot of computes")
        self._done.add(op)
        if replica.account is not None:
            replica.account.settle(op)
        if self.observe is not None:
            self.observe(op, replica.module)

    def _forward(self, op: Op, replica: Replica) -> None:
        batch = self._batch(op)
        (source,) = self.schedule.needs(op) or (None,)
        x = batch.tokens if source is None else self._incoming(source)
        if self.schedule.is_last(op):
            self.losses[op.lane, op.mb] = replica.forward(op.task, x, batch.targets)
        else:
            self._keep(Op(SF, op.lane, op.stage, op.mb), replica.forward(op.task, x))

    def _backward(self, op: Op, replica: Replica) -> None:
        _, *sources = self.schedule.needs(op)
        gradient = self._incoming(sources[0]) if sources else None
        found = replica.backward(op.task, gradient)
        if found is not None:
            self._keep(Op(SB, op.lane, op.stage, op.mb), found)

    def _batch(self, op: Op) -> Batch:
        batches = self.supply.batches[op.lane]
        if op.mb >= len(batches):
            raise self._misstep(
                op, "a microbatch is in the data", f"lane {op.lane} has {len(batches)}", "count from 0 or supply more"
            )
        return batches[op.mb]

    # Tensors between a stage and the next.

    def _keep(self, send: Op, value: Tensor) -> None:
        if not self.schedule.crosses(send):
            self._uses[send] += 1  # handed to the neighbour stage on this rank
        if self._uses[send]:
            self._produced[send] = value

    def _take(self, send: Op) -> Tensor:
        self._uses[send] -= 1
        return self._produced[send] if self._uses[send] else self._produced.pop(send)

    def _incoming(self, source: Op) -> Tensor:
        """The tensor that the op ``source`` gives: a receive, or the F or B of a neighbour stage on this rank."""
        if source.kind in RECEIVES:
            message = self._received[source][0]
            payload, message.payload = message.payload, None
            assert payload is not None
            return payload
        return self._take(Op(SF if source.kind is Kind.F else SB, *source[1:4]))

    # Rules.

    def _check_holds(self, op: Op) -> None:
        holder = self.schedule.rank_of(op)
        if holder != self.number:
            raise self._misstep(op, "a rank runs ops of its own stages", f"rank {holder} holds it", "move the op there")

    def _check_needs(self, op: Op) -> None:
        for need in self.schedule.needs(op):
            if need not in self._done and not self._received[need]:
                raise self._misstep(
                    op,
                    f"{op.kind} runs after what it needs on its rank",
                    f"{need} has not been {'posted' if need.kind in RECEIVES else 'run'}",
                    f"put {need} before it",
                )

    def _misstep(self, op: Op, rule: str, got: str, fix: str) -> Misstep:
        return Misstep(self.number, self._slot, op, rule, got, fix)
