"""Schedules side by side: simulated on the same model, with their memory, and which one is best.

Costs and sizes are those of a *share*, 1/P of the model's layers, on P ranks.  A stage of DualPipe, 1F1B or ZB1P is one
share.  A schedule with 2P stages has half shares: two on each rank where DualPipe has two whole ones, which are twice
the parameters.  All microbatches are of one size, whatever their lane, so each schedule does the same work::

    DualPipe     rank 0  stage 0 of >, stage 3 of <      2 shares      F of a stage: 1
    1F1B         rank 0  stage 0                         1 share       F of a stage: 1
    ZBV          rank 0  stages 0 and 7 of 8             1 share       F of a stage: 1/2
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from dualpipe.errors import RuleError
from dualpipe.schedule import COMPUTE, SENDS, B, F, Op, Schedule, Slot, W, full_backwards
from dualpipe.timeline.simulate import Stuck, simulate
from dualpipe.timeline.summary import count_collectives, parse_numbers
from dualpipe.timeline.timeline import Costs, Timeline

SIZES = ("B", "W", "weights")
_SAME = 1e-9
"""The relative difference up to which two makespans are equal."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of one share of the model.

    Parameters
    ----------
    B, W:
        What one microbatch keeps from F to the end of B, and from B to the end of a W that is deferred.
    weights:
        Parameters with their gradients and, where they are on the device, the states of the optimizer.
    """

    B: float
    W: float
    weights: float = 0.0


def parse_sizes(text: str) -> Sizes:
    """``"B=8e9,W=3e9,weights=2e10"`` as sizes; ``weights`` is 0 if left out.  Raises ``RuleError``."""
    given = parse_numbers("--bytes", text, SIZES)
    if not {"B", "W"} <= given.keys() or not all(0 <= size <= 1e100 for size in given.values()):
        raise RuleError(
            "--bytes gives B and W, and may give weights, each 0 or more",
            f"got {text!r}",
            "write for instance B=8e9,W=3e9",
        )
    return Sizes(**given)


def describe_sizes(sizes: Sizes) -> str:
    """Sizes as ``parse_sizes`` reads them."""
    return ",".join(f"{name}={getattr(sizes, name):g}" for name in SIZES)


class Level(NamedTuple):
    """How much a rank holds from a time on."""

    time: float
    level: float


@dataclass(frozen=True)
class Candidate:
    """A schedule that was simulated.  Microbatches, W and parameters are counted in shares of the model.

    Attributes
    ----------
    timeline:
        With the costs of the schedule's own stages.
    share:
        The size of a stage in shares: 1, or 1/2 for a schedule with 2P stages.
    """

    name: str
    timeline: Timeline
    share: float
    sizes: Sizes | None = None

    @cached_property
    def activations(self) -> tuple[float, ...]:
        """For each rank the most microbatches that are live at once."""
        return tuple(self.share * peak for peak in self.timeline.peak_activations)

    @cached_property
    def pending_w(self) -> tuple[float, ...]:
        """For each rank the most W that are deferred at once."""
        return tuple(self.share * peak for peak in self.timeline.peak_pending_w)

    @cached_property
    def parameters(self) -> tuple[float, ...]:
        """For each rank the shares of the model that it holds."""
        routes = self.timeline.schedule.routes.values()
        return tuple(self.share * sum(route.count(rank) for route in routes) for rank in range(len(self.activations)))

    @cached_property
    def messages(self) -> int:
        """The messages of all ranks."""
        return sum(at.op.kind in SENDS for at in self.timeline.schedule)

    @cached_property
    def activation_bytes(self) -> tuple[float, ...] | None:
        """For each rank the most bytes that its microbatches keep, or ``None`` without sizes."""
        if self.sizes is None:
            return None
        return tuple(max(level for _, level in self.memory(rank)) for rank in range(len(self.activations)))

    @cached_property
    def bytes(self) -> tuple[float, ...] | None:
        """For each rank the peak of its activations and its weights together."""
        if self.sizes is None or self.activation_bytes is None:
            return None
        weights = self.sizes.weights
        return tuple(a + weights * p for a, p in zip(self.activation_bytes, self.parameters, strict=True))

    def memory(self, rank: int) -> list[Level]:
        """The memory of a rank's activations over time: bytes if there are sizes, else live microbatches in shares.

        A slot first allocates, at its start, and releases at its end.
        """
        levels, level = [Level(0.0, 0.0)], 0.0
        for span in self.timeline.spans[rank]:
            if span.ops[0].kind not in COMPUTE:
                continue
            gained, lost = _microbatches(span.ops) if self.sizes is None else _bytes(span.ops, self.sizes)
            levels.append(Level(span.start, level + self.share * gained))
            level += self.share * (gained - lost)
            levels.append(Level(span.end, level))
        return levels


def _microbatches(slot: Slot) -> tuple[float, float]:
    kinds = [op.kind for op in slot]
    return kinds.count(F), kinds.count(W)


def _bytes(slot: Slot, sizes: Sizes) -> tuple[float, float]:
    kinds, full = [op.kind for op in slot], len(full_backwards(slot))
    gained = kinds.count(F) * sizes.B + (kinds.count(B) - full) * sizes.W
    return gained, kinds.count(B) * sizes.B + (kinds.count(W) - full) * sizes.W


class Absent(NamedTuple):
    """A schedule that cannot take part, and why: in a line, and in ``story`` the whole text if that is longer."""

    name: str
    reason: str
    story: str = ""


def candidate(
    name: str, schedule: Schedule, costs: Costs, sizes: Sizes | None = None, *, blocking: bool = False
) -> Candidate | Absent:
    """Simulate a schedule on the costs of a share; one that gets stuck, or does less or more than its work, is absent.

    A message takes its latency from when it is sent.  When its receive is posted is the runtime's affair, and in a
    schedule whose messages were added by ``lower`` that of ``lower``, so it is not held against the schedule.

    ``costs.stages`` are those of equal slices of the model, in order of depth and of any number, each as if a whole
    share were like it.  A stage that has parts of several slices has the mean of these.
    """
    if (missing := _missing(schedule)) is not None:
        return Absent(name, f"it does not run {missing} exactly once, so it is not compared (see `dualpipe prove`)")
    share = schedule.ranks / schedule.stages
    of_depth = replace(costs, stages=_sliced(costs.stages, schedule.stages))
    try:
        timeline = simulate(schedule, of_depth.times(share), blocking=blocking, eager=True)
    except Stuck as stuck:
        first, *others = stuck.waits
        more = f", and {len(others)} more" if others else ""
        return Absent(name, f"it gets stuck: {first}{more}", str(stuck))
    return Candidate(name, timeline, share, sizes)


def _missing(schedule: Schedule) -> Op | None:
    """The first F, B or W of a microbatch at a stage that the schedule does not run exactly once."""
    runs = Counter(at.op for at in schedule if at.op.kind in COMPUTE)
    every = (
        Op(kind, lane, stage, mb)
        for lane, count in schedule.microbatches.items()
        for stage in range(schedule.stages)
        for mb in range(count)
        for kind in (F, B, W)
    )
    return next((op for op in every if runs[op] != 1), None)


def _sliced(slices: Sequence[Costs], stages: int) -> tuple[Costs, ...]:
    """The costs of so many slices of the same model: means over the parts of the given ones that each has."""
    return tuple(_mean(slices, stage / stages, (stage + 1) / stages) for stage in range(stages)) if slices else ()


def _mean(slices: Sequence[Costs], start: float, end: float) -> Costs:
    parts = [
        (max(0.0, min(end, (number + 1) / len(slices)) - max(start, number / len(slices))) / (end - start), each)
        for number, each in enumerate(slices)
    ]
    mean = {name: sum(part * getattr(each, name) for part, each in parts) for name in ("F", "B", "W", "backward")}
    return Costs(mean["F"], mean["B"], mean["W"], BW=mean["backward"])


@dataclass(frozen=True)
class Limits:
    """What a rank may hold: live microbatches in shares, and bytes of activations and weights together."""

    activations: float | None = None
    bytes: float | None = None

    def excess(self, each: Candidate) -> str:
        """Why a candidate does not fit; empty if it fits."""
        most = max(each.activations)
        if self.activations is not None and most > self.activations:
            return f"holds {most:g} microbatches, and {self.activations:g} are allowed"
        if self.bytes is not None and each.bytes is not None and max(each.bytes) > self.bytes:
            return f"holds {max(each.bytes):g} bytes, and {self.bytes:g} are allowed"
        return ""


@dataclass(frozen=True)
class Ranking:
    """Candidates from the shortest makespan to the longest, those that are absent, and the limits of memory.

    Candidates with equal makespans are ordered by what a rank holds: bytes if they are known, else parameters, then
    live microbatches, then pending W.  If these are equal too, the candidate that was given first comes first.
    """

    candidates: tuple[Candidate, ...]
    absent: tuple[Absent, ...]
    limits: Limits

    @property
    def best(self) -> tuple[Candidate, ...]:
        """The fastest that fits, and those that fit and are as fast; empty if none fits."""
        fitting = [each for each in self.candidates if not self.limits.excess(each)]
        return tuple(each for each in fitting if _equal(each, fitting[0]))

    def as_json(self) -> dict[str, Any]:
        return {
            "schedules": [*map(self._candidate, self.candidates), *map(_absent, self.absent)],
            "best": [each.name for each in self.best],
        }

    def _candidate(self, each: Candidate) -> dict[str, Any]:
        timeline = each.timeline
        return {
            "schedule": each.name,
            "makespan": timeline.makespan,
            "bubble_share": timeline.bubble_share,
            "bubble": list(timeline.bubble),
            "peak_activations": list(each.activations),
            "peak_activation_bytes": None if each.activation_bytes is None else list(each.activation_bytes),
            "peak_bytes": None if each.bytes is None else list(each.bytes),
            "peak_pending_w": list(each.pending_w),
            "parameters": list(each.parameters),
            "messages": each.messages,
            "collectives": count_collectives(timeline.schedule),
            "fits": not self.limits.excess(each),
            "reason": self.limits.excess(each) or None,
        }


_FIGURES = (
    "makespan",
    "bubble_share",
    "bubble",
    "peak_activations",
    "peak_activation_bytes",
    "peak_bytes",
    "peak_pending_w",
    "parameters",
    "messages",
    "collectives",
)
"""The keys of a candidate's figures in JSON."""


def _absent(each: Absent) -> dict[str, Any]:
    """The keys of a candidate, with no figures."""
    figures = dict.fromkeys(_FIGURES)
    return {"schedule": each.name, **figures, "fits": False, "reason": each.story or each.reason}


def rank(found: Iterable[Candidate | Absent], limits: Limits) -> Ranking:
    """The ranking of what was found.  Raises ``RuleError`` for a limit on bytes without sizes."""
    every = list(found)
    candidates = [each for each in every if isinstance(each, Candidate)]
    if limits.bytes is not None and any(each.bytes is None for each in candidates):
        raise RuleError("--max-bytes needs the sizes", "got no --bytes", "add --bytes B=...,W=...,weights=...")
    first = {id(each): number for number, each in enumerate(candidates)}
    groups = _groups(sorted(candidates, key=lambda each: each.timeline.makespan))
    order = [each for group in groups for each in sorted(group, key=lambda each: (_holds(each), first[id(each)]))]
    return Ranking(tuple(order), tuple(each for each in every if isinstance(each, Absent)), limits)


def _groups(by_time: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates of equal makespan together."""
    groups: list[list[Candidate]] = []
    for each in by_time:
        if groups and _equal(groups[-1][0], each):
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def _equal(one: Candidate, other: Candidate) -> bool:
    first, second = one.timeline.makespan, other.timeline.makespan
    return abs(first - second) <= _SAME * max(first, second)


def _holds(each: Candidate) -> tuple[float, ...]:
    if each.bytes is not None:
        return (max(each.bytes),)
    return (max(each.parameters), max(each.activations), max(each.pending_w))
