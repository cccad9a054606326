"""The costs that a simulation takes and the timeline that it gives, with its bubble and its peaks.

Times are in the unit of the costs.
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
    """A cost outside its range."""


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
        An overlapped slot ``F+B+W``; ``F + BW``, no credit for the overlap, if not given.  A slot of F and B that
        leaves W for later gets the same credit in proportion: it takes ``(F + B) * FB / (F + BW)``.
    latency:
        The time from when both sides have posted a message to its completion.
    AA, AR, US, RS, RG:
        One collective of that kind, from when all members have posted it.
    stages:
        For each stage its own F, B, W and BW, where stages differ; F to BW above are then those of a typical stage.
        FB is a credit for all: a slot takes ``FB / (F + BW)`` times the sum of its ops.

    The model in which one full backward costs 2 however it is split is ``Costs(B=2, BW=2)``; an F&B pair then
    costs 3.

    Raises
    ------
    CostError
        For a cost that is negative or above 1e100, so that sums stay finite, and for ``FB`` where ``F + BW`` is 0.
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
                raise CostError(f"a cost must be a number from 0 to {_MOST:g}", f"{name} is {cost}", "correct it")
        if self.FB is not None and self.F + self.backward == 0:
            raise CostError("FB needs computes that take time", f"FB is {self.FB}", "give F, B or W a cost")

    @property
    def numbers(self) -> dict[str, float | None]:
        """The costs by name, without those of single stages, and of collectives that take no time."""
        return {n: cost for n, cost in vars(self).items() if n != "stages" and (n not in COLLECTIVES or cost)}

    def of(self, op: Op) -> Costs:
        """The costs of the op's stage."""
        return self.stages[op.stage] if self.stages else self

    @property
    def backward(self) -> float:
        """What B and W of one microbatch take in one slot."""
        return self.B + self.W if self.BW is None else self.BW

    def times(self, factor: float) -> Costs:
        """The costs of a stage that is ``factor`` times as large; messages take as long."""
        scaled = {name: None if cost is None else cost * factor for name, cost in self.numbers.items()}
        stages = tuple(stage.times(factor) for stage in self.stages)
        return Costs(**scaled | {"latency": self.latency}, stages=stages)  # type: ignore[arg-type] # F, B, W: no None

    def collective(self, op: Op) -> float:
        """What a collective takes."""
        return {Kind.AA: self.AA, Kind.AR: self.AR, Kind.US: self.US, Kind.RS: self.RS, Kind.RG: self.RG}[op.kind]

    def slot(self, slot: Slot) -> float:
        """What a slot of computes takes."""
        full = full_backwards(slot)
        total = sum(self._op(op, op.task in full) for op in slot)
        if self.FB is None or not {F, B} <= {op.kind for op in slot}:
            return total
        return total / (self.F + self.backward) * self.FB

    def _op(self, op: Op, full: bool) -> float:
        """What an op takes; of a full backward B takes the time of both."""
        costs = self.of(op)
        if full and op.kind is not F:
            return costs.backward if op.kind is B else 0.0
        return {F: costs.F, B: costs.B, W: costs.W}[op.kind]


class Span(NamedTuple):
    """One slot of one rank from start to end.

    A slot of messages or collectives ends at once; if blocking, when the last of them has completed.
    """

    slot: int
    ops: Slot
    start: float
    end: float


class Message(NamedTuple):
    """A send and the receive that it matches: their places, when each was posted, when the message completed."""

    send: Placed
    receive: Placed
    sent: float
    awaited: float
    completed: float


class Collective(NamedTuple):
    """A member's part in a collective: its place, when it was posted, when all members had, when it ended.

    One that an earlier collective of its rank held up counts as posted when that one ended.
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
        What was run.
    spans:
        For each rank its slots in order.
    messages:
        In the order in which their second side was posted.
    collectives:
        Each once for every member, in the order in which the first member posted it.
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
        """For each rank the time that it computes."""
        return tuple(
            sum(span.end - span.start for span in spans if span.ops[0].kind in COMPUTE) for spans in self.spans
        )

    @cached_property
    def bubble(self) -> tuple[float, ...]:
        """For each rank the time that it does not compute, up to the makespan."""
        return tuple(self.makespan - busy for busy in self.busy)

    @cached_property
    def bubble_share(self) -> float:
        """Idle time of all ranks over ``ranks * makespan``: 0 if no rank ever waits."""
        return sum(self.bubble) / (len(self.spans) * self.makespan) if self.makespan else 0.0

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """For each rank the most microbatches that are live at once, each from its F to the end of its W.

        Counted per stage and lane.  Inside a slot, what is allocated counts before what is released.
        """
        return tuple(_peak(spans, _forwards, _weights) for spans in self.spans)

    @cached_property
    def peak_pending_w(self) -> tuple[int, ...]:
        """For each rank the most W that are deferred at once: B has run and W has not.

        The W of a full backward, in one slot with its B, is not deferred.  Inside a slot, what is added counts before
        what is removed.
        """
        return tuple(_peak(spans, _deferred, _caught_up) for spans in self.spans)


def _forwards(slot: Slot) -> int:
    return sum(op.kind is F for op in slot)


def _weights(slot: Slot) -> int:
    return sum(op.kind is W for op in slot)


def _deferred(slot: Slot) -> int:
    return sum(op.kind is B for op in slot) - len(full_backwards(slot))


def _caught_up(slot: Slot) -> int:
    return _weights(slot) - len(full_backwards(slot))


def _peak(spans: tuple[Span, ...], gained: Callable[[Slot], int], lost: Callable[[Slot], int]) -> int:
    """The highest level, where each slot first gains and then loses."""
    level = peak = 0
    for span in spans:
        level += gained(span.ops)
        peak = max(peak, level)
        level -= lost(span.ops)
    return peak
