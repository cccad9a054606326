"""The input and the result of a simulation: costs, and a timeline with its bubble and its peaks.

All times are in the unit of the costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dualpipe.errors import RuleError
from dualpipe.schedule import COLLECTIVES, COMPUTE, B, F, Kind, Op, Placed, Schedule, Slot, W, full_backwards

_MOST = 1e100


class CostError(RuleError):
    """A cost outside its range, or an ``FB`` that has nothing to scale."""


@dataclass(frozen=True)
class Costs:
    """The time that ops and messages take, in any unit.

    Parameters
    ----------
    F, B, W:
        One forward, one backward for the input, one backward for the weights.
    BW:
        B and W of one microbatch in one slot, the full backward; ``B + W`` if not given.
    FB:
        A slot with an F&B pair, ``F+B+W``.  If not given, it takes ``F + BW``, as if the overlap saved nothing.  A pair
        that leaves W for later is shortened by the same factor: it takes ``(F + B) * FB / (F + BW)``.
    latency:
        The time from when both sides have posted a message to its completion.
    AA, AR, US, RS, RG:
        One collective of that kind, from when all members have posted it.
    stages:
        If stages differ, the costs of each; their F, B, W and BW are used.  The F, B, W, BW and FB above are then those
        of a typical stage, and a slot with an F&B pair takes ``FB / (F + BW)`` times the sum of its ops.

    By default a full backward takes 2, and an F&B pair 3.

    Raises
    ------
    CostError
        If a cost is negative or above 1e100 (so that sums stay finite), and if ``FB`` is given while ``F + BW`` is 0.
    """

    F: float = 1.0
    B: float = 1.0
    W: float = 1.0
    BW: float | None = None
    FB: float | None = None
    latency: float = 0.0
    AA: float = 0.0
    AR: float = 0.0
    US: float = 0.0
    RS: float = 0.0
    RG: float = 0.0
    stages: tuple[Costs, ...] = ()

    def __post_init__(self) -> None:
        for name, cost in self.numbers.items():
            if cost is not None and not 0 <= cost <= _MOST:
                rule = f"a cost must be a number from 0 to {_MOST:g}"
                raise CostError(rule, f"{name} is {cost}", f"give {name} a number in this range")
        if self.FB is not None and self.F + self.backward == 0:
            raise CostError("FB needs computes that take time", f"FB is {self.FB}", "give F, B or W a cost")

    @property
    def numbers(self) -> dict[str, float | None]:
        """The costs by name, except ``stages`` and the collectives that take no time."""
        return {n: cost for n, cost in vars(self).items() if n != "stages" and (n not in COLLECTIVES or cost)}

    def of(self, op: Op) -> Costs:
        """The costs of the op's stage."""
        return self.stages[op.stage] if self.stages else self

    @property
    def backward(self) -> float:
        """The time of a full backward: B and W of one microbatch in one slot."""
        return self.B + self.W if self.BW is None else self.BW

    def times(self, factor: float) -> Costs:
        """The costs of stages that are ``factor`` times as large: all times but the latency of messages are scaled."""
        scaled = {name: None if cost is None else cost * factor for name, cost in self.numbers.items()}
        stages = tuple(stage.times(factor) for stage in self.stages)
        return Costs(**scaled | {"latency": self.latency}, stages=stages)  # type: ignore[arg-type] # F, B, W: no None

    def collective(self, op: Op) -> float:
        """The time of a collective."""
        return {Kind.AA: self.AA, Kind.AR: self.AR, Kind.US: self.US, Kind.RS: self.RS, Kind.RG: self.RG}[op.kind]

    def slot(self, slot: Slot) -> float:
        """The time of a slot of computes."""
        full = full_backwards(slot)
        total = sum(self._op(op, op.task in full) for op in slot)
        if self.FB is None or not {F, B} <= {op.kind for op in slot}:
            return total
        return total / (self.F + self.backward) * self.FB

    def _op(self, op: Op, full: bool) -> float:
        """The time of an op.  In a full backward B takes the time of both, and W takes none."""
        costs = self.of(op)
        if full and op.kind is not F:
            return costs.backward if op.kind is B else 0.0
        return {F: costs.F, B: costs.B, W: costs.W}[op.kind]


class Span(NamedTuple):
    """One slot of one rank from start to end.

    A slot of messages or collectives ends as soon as they are posted.  In a simulation with blocking messages it ends
    when the last of them has completed.
    """

    slot: int
    ops: Slot
    start: float
    end: float


class Message(NamedTuple):
    """A send and the receive that it matches: their places, and the times of the message.

    ``sent`` is when the send was posted, ``awaited`` when the receive was posted.
    """

    send: Placed
    receive: Placed
    sent: float
    awaited: float
    completed: float


class Collective(NamedTuple):
    """A member's part in a collective: its place, and three times.

    ``posted`` is when this rank posted it; if an earlier collective of the rank was still running then, it is when that
    one ended.  ``began`` is when all members had posted it, ``ended`` when it completed.
    """

    at: Placed
    posted: float
    began: float
    ended: float


@dataclass(frozen=True)
class Timeline:
    """When everything happened.

    Attributes
    ----------
    schedule, costs:
        What was simulated.
    spans:
        The slots of each rank, in order.
    messages:
        All messages, in the order in which they were matched.
    collectives:
        All collectives, each once for every member, in the order in which the first member posted them.
    """

    schedule: Schedule
    costs: Costs
    spans: tuple[tuple[Span, ...], ...]
    messages: tuple[Message, ...]
    collectives: tuple[Collective, ...] = ()

    @cached_property
    def makespan(self) -> float:
        """The time at which the last slot, message or collective completes."""
        ends = [spans[-1].end for spans in self.spans if spans]
        ends += [message.completed for message in self.messages]
        return max([0.0, *ends, *(collective.ended for collective in self.collectives)])

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """For each rank the time during which it computes."""
        return tuple(
            sum(span.end - span.start for span in spans if span.ops[0].kind in COMPUTE) for spans in self.spans
        )

    @cached_property
    def bubble(self) -> tuple[float, ...]:
        """For each rank the time, up to the makespan, during which it does not compute."""
        return tuple(self.makespan - busy for busy in self.busy)

    @cached_property
    def bubble_share(self) -> float:
        """The bubbles of all ranks divided by ``ranks * makespan``: 0 if no rank is ever idle."""
        return sum(self.bubble) / (len(self.spans) * self.makespan) if self.makespan else 0.0

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """For each rank the most microbatches that are live at once, each from its F to the end of its W.

        A microbatch at two chunks of a rank counts twice.  If a slot has an F and a W, both microbatches count as live.
        """
        return tuple(_peak(spans, _forwards, _weights) for spans in self.spans)

    @cached_property
    def peak_pending_w(self) -> tuple[int, ...]:
        """For each rank the most W that are pending at once: B has run and W has not.

        The W of a full backward, in one slot with its B, is not deferred.  If a slot defers a W and runs another one,
        both count as pending.
        """
        return tuple(_peak(spans, _newly_deferred, _deferred_run) for spans in self.spans)


def _forwards(slot: Slot) -> int:
    return sum(op.kind is F for op in slot)


def _weights(slot: Slot) -> int:
    return sum(op.kind is W for op in slot)


def _newly_deferred(slot: Slot) -> int:
    return sum(op.kind is B for op in slot) - len(full_backwards(slot))


def _deferred_run(slot: Slot) -> int:
    return _weights(slot) - len(full_backwards(slot))


def _peak(spans: tuple[Span, ...], gained: Callable[[Slot], int], lost: Callable[[Slot], int]) -> int:
    """The highest level, if each slot first adds what it gains and then subtracts what it loses."""
    level = peak = 0
    for span in spans:
        level += gained(span.ops)
        peak = max(peak, level)
        level -= lost(span.ops)
    return peak
