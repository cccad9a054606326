"""What a party that ran a schedule has to show for each step, and how it is held against the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from dualpipe.schedule import Lane, Schedule
from reference.oracle import StepTruth
from reference.stopwatch import StepTimes

Copy = tuple[Lane, int]
"""One of a stage's copies: its lane and stage."""
Tensors = Mapping[str, Tensor]

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass
class StepTrace:
    """One step, as seen on one rank or on all: tensors are detached, on the CPU.

    ``losses[lane][mb]``; by copy and parameter name ``lane_gradients`` (before the copies are reduced),
    ``gradients`` (after) and ``weights`` (after the optimizer's step).  ``times`` by rank, of a timed case.
    """

    losses: dict[Lane, dict[int, Tensor]] = field(default_factory=dict)
    lane_gradients: dict[Copy, Tensors] = field(default_factory=dict)
    gradients: dict[Copy, Tensors] = field(default_factory=dict)
    weights: dict[Copy, Tensors] = field(default_factory=dict)
    times: dict[int, StepTimes] = field(default_factory=dict)


def merge(ranks: Sequence[Sequence[StepTrace]]) -> list[StepTrace]:
    """The steps of all ranks from each rank's own."""
    merged = []
    for parts in zip(*ranks, strict=True):
        whole = StepTrace()
        for part in parts:
            for lane, losses in part.losses.items():
                whole.losses.setdefault(lane, {}).update(losses)
            whole.lane_gradients |= part.lane_gradients
            whole.gradients |= part.gradients
            whole.weights |= part.weights
            whole.times |= part.times
        merged.append(whole)
    return merged


@dataclass(frozen=True)
class Difference:
    """Where a party departs from the oracle: ``what`` of ``where``, at a step, and by how much."""

    step: int
    what: str
    stage: int
    where: str
    ulps: int | None
    detail: str

    def __str__(self) -> str:
        size = "" if self.ulps is None else f", by up to {self.ulps} units in the last place"
        return f"step {self.step}, stage {self.stage}: {self.what} of {self.where} {self.detail}{size}"


def differences(schedule: Schedule, truth: Sequence[StepTruth], found: Sequence[StepTrace]) -> list[Difference]:
    """Every tensor that is not ``torch.equal`` to the oracle's, in order of step, kind and stage."""
    return [d for step, (t, f) in enumerate(zip(truth, found, strict=True)) for d in _of_step(schedule, step, t, f)]


def _of_step(schedule: Schedule, step: int, truth: StepTruth, found: StepTrace) -> Iterator[Difference]:
    last = schedule.stages - 1
    for lane, losses in zip(schedule.lanes, truth.losses, strict=True):
        seen = found.losses.get(lane, {})
        for mb, loss in enumerate(losses):
            yield from compare(partial(Difference, step, "loss", last, f"{mb}{lane}"), loss, seen.get(mb))
        for mb in sorted(seen.keys() - set(range(len(losses)))):
            yield Difference(step, "loss", last, f"{mb}{lane}", None, "is of a microbatch that does not exist")
    for lane, stage in _copies(schedule):
        expected = {
            "gradient of its lane": (truth.lane_gradients[schedule.lanes.index(lane)][stage], found.lane_gradients),
            "gradient": (truth.gradients[stage], found.gradients),
            "weight": (truth.weights[stage], found.weights),
        }
        for what, (true, copies) in expected.items():
            tensors = copies.get((lane, stage), {})
            for name in dict.fromkeys([*true, *tensors]):
                place = partial(Difference, step, what, stage, f"{name} (copy {lane})")
                yield from compare(place, true.get(name), tensors.get(name))
    for stage in range(schedule.stages):
        yield from _between_copies(schedule, step, stage, found)


def _between_copies(schedule: Schedule, step: int, stage: int, found: StepTrace) -> Iterator[Difference]:
    """The copies of a stage against each other, so that this shows even where both are wrong."""
    first, *others = (found.weights.get((lane, stage), {}) for lane in schedule.lanes)
    for other in others:
        for name in dict.fromkeys([*first, *other]):
            place = partial(Difference, step, "weight of one copy against the other's", stage, name)
            yield from compare(place, first.get(name), other.get(name))


def _copies(schedule: Schedule) -> Iterator[Copy]:
    for stage in range(schedule.stages):
        for lane in schedule.lanes:
            yield lane, stage


def compare(
    place: Callable[[int | None, str], Difference], true: Tensor | None, found: Tensor | None
) -> Iterator[Difference]:
    if true is None and found is None:
        return
    if true is None or found is None:
        yield place(None, "is missing" if found is None else "should not exist")
    elif true.shape != found.shape or true.dtype != found.dtype:
        yield place(None, f"is {list(found.shape)} {found.dtype} instead of {list(true.shape)} {true.dtype}")
    elif not torch.equal(true, found):
        finite = bool(torch.isfinite(found).all())
        yield place(ulps(true, found), "differs") if finite else place(None, "is not finite")


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance of two tensors of one floating dtype and shape, in units in the last place.

    That is the number of representable values that lie between two numbers.  The bits of a float, read as an
    integer and mirrored below zero, are in the order of its value, so it is the difference of two integers.
    """
    integer = _INTEGERS[a.element_size()]
    x, y = (_ordered(t.contiguous().view(integer)) for t in (a, b))
    if integer is torch.int64:  # a difference may not fit
        return max((abs(i - j) for i, j in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)), default=0)
    return int((x - y).abs().max()) if x.numel() else 0


def _ordered(bits: Tensor) -> Tensor:
    lowest = torch.iinfo(bits.dtype).min
    wide = bits.to(torch.int64)
    return torch.where(wide < 0, lowest - wide, wide)


def vital_signs(truth: Sequence[StepTruth], initial: Sequence[Tensors]) -> list[str]:
    """What shows that something happened at all; a list of complaints, empty when all is well.

    A run in which nothing happens matches, too: gradients must be finite and not all zero, and weights move from
    ``initial`` on at every step; so do the losses, where there is more than one step.
    """
    complaints = []
    for step, result in enumerate(truth):
        for stage, gradients in enumerate(result.gradients):
            for name, gradient in gradients.items():
                if not torch.isfinite(gradient).all():
                    complaints.append(f"step {step}, stage {stage}: the gradient of {name} is not finite")
                elif not gradient.any():
                    complaints.append(f"step {step}, stage {stage}: the gradient of {name} is zero")
    for step, (before, after) in enumerate(pairwise(truth), start=1):
        if _flat(before) == _flat(after):
            complaints.append(f"step {step}: the losses are those of the step before")
    weights = [initial, *(step.weights for step in truth)]
    for step, (old, new) in enumerate(pairwise(weights)):
        for stage, (a, b) in enumerate(zip(old, new, strict=True)):
            complaints += [
                f"step {step}, stage {stage}: {name} did not move" for name in a if torch.equal(a[name], b[name])
            ]
    return complaints


def _flat(step: StepTruth) -> list[float]:
    return [float(loss) for lane in step.losses for loss in lane]
