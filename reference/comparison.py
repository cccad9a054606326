"""Compare what an implementation computed with the oracle: every loss, gradient and weight, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from dualpipe.schedule import Chunk, Schedule
from reference.oracle import StepTruth, Tensors
from reference.trace import StepTrace

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Difference:
    """A tensor that differs from the oracle's: ``what`` of ``where`` at a step, by ``ulps`` units in the last place."""

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
    """Every tensor that is not ``torch.equal`` to the oracle's, ordered by step, kind and stage."""
    steps = enumerate(zip(truth, found, strict=True))
    return [difference for step, (t, f) in steps for difference in _in_step(schedule, step, t, f)]


def _in_step(schedule: Schedule, step: int, truth: StepTruth, found: StepTrace) -> Iterator[Difference]:
    last = schedule.stages - 1
    for lane, losses in zip(schedule.lanes, truth.losses, strict=True):
        own = found.losses.get(lane, {})
        for mb, loss in enumerate(losses):
            yield from compare(partial(Difference, step, "loss", last, f"{mb}{lane}"), loss, own.get(mb))
        for mb in sorted(own.keys() - set(range(len(losses)))):
            yield Difference(step, "loss", last, f"{mb}{lane}", None, "belongs to a microbatch that does not exist")
    for stage in range(schedule.stages):
        for number, lane in enumerate(schedule.lanes):
            expected = {
                "gradient of its lane": (truth.lane_gradients[number][stage], found.lane_gradients),
                "gradient": (truth.gradients[stage], found.gradients),
                "weight": (truth.weights[stage], found.weights),
            }
            for what, (true, replicas) in expected.items():
                tensors = replicas.get(Chunk(lane, stage), {})
                for name in dict.fromkeys([*true, *tensors]):
                    difference = partial(Difference, step, what, stage, f"{name} (replica {lane})")
                    yield from compare(difference, true.get(name), tensors.get(name))
    for stage in range(schedule.stages):
        yield from _between_replicas(schedule, step, stage, found)


def _between_replicas(schedule: Schedule, step: int, stage: int, found: StepTrace) -> Iterator[Difference]:
    """The replicas of a stage compared with each other, which shows a difference even if both are wrong."""
    first, *others = (found.weights.get(Chunk(lane, stage), {}) for lane in schedule.lanes)
    for other in others:
        for name in dict.fromkeys([*first, *other]):
            difference = partial(Difference, step, "weight of one replica compared with the other's", stage, name)
            yield from compare(difference, first.get(name), other.get(name))


def compare(
    difference: Callable[[int | None, str], Difference], true: Tensor | None, found: Tensor | None
) -> Iterator[Difference]:
    """At most one difference, built by ``difference`` from the units in the last place and the detail."""
    if true is None and found is None:
        return
    if true is None or found is None:
        yield difference(None, "is missing" if found is None else "should not exist")
    elif true.shape != found.shape or true.dtype != found.dtype:
        yield difference(None, f"is {list(found.shape)} {found.dtype} instead of {list(true.shape)} {true.dtype}")
    elif not torch.equal(true, found):
        finite = bool(torch.isfinite(found).all())
        yield difference(ulps(true, found), "differs") if finite else difference(None, "is not finite")


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest distance between two tensors of one floating dtype and shape, in units in the last place.

    The distance of two numbers is the count of representable values from one to the other.  The bits of a float, read
    as an integer and mirrored below zero, are ordered like its value, so the distance is a difference of integers.
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


def failed_sanity_checks(truth: Sequence[StepTruth], initial: Sequence[Tensors]) -> list[str]:
    """Signs that the oracle itself did not train; empty if it did.

    Two runs that compute nothing are equal as well.  So every gradient must be finite and not all zero, every weight
    must change in every step, beginning with ``initial``, and the losses of two steps must differ.
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
        if _losses(before) == _losses(after):
            complaints.append(f"step {step}: the losses are those of the previous step")
    weights = [initial, *(step.weights for step in truth)]
    for step, (old, new) in enumerate(pairwise(weights)):
        for stage, (a, b) in enumerate(zip(old, new, strict=True)):
            complaints += [
                f"step {step}, stage {stage}: {name} did not change" for name in a if torch.equal(a[name], b[name])
            ]
    return complaints


def _losses(step: StepTruth) -> list[float]:
    return [float(loss) for lane in step.losses for loss in lane]
