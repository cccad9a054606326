"""How the gradients are scaled with respect to the losses: alike on all stages, and as their mean or their sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualpipe.record.comparison import ChunkComparison, LossWeights
from dualpipe.record.events import ForwardId, RankLog
from dualpipe.record.plain.proportions import alike
from dualpipe.schedule import Chunk, Lane, Task


def factors(chunks: Sequence[ChunkComparison]) -> dict[Chunk, float]:
    """For each stage the factor of its gradients with respect to the losses, where it is known.

    A stage that takes a multiple of the next one's gradient scales its own gradients, and those of all stages before.
    """
    found: dict[Chunk, float] = {}
    of_lane: dict[Lane, float | None] = {}
    for each in sorted(chunks, key=lambda each: -each.chunk.stage):
        lane = each.chunk.lane
        before = of_lane.get(lane, 1.0)
        taken = None if before is None or each.taken is None else before * each.taken
        of_lane[lane] = taken
        if taken is not None and each.factor is not None:
            found[each.chunk] = taken * each.factor
    return found


def uneven(found: Mapping[Chunk, float]) -> str:
    """What is wrong if the stages are scaled differently."""
    groups: dict[float, list[Chunk]] = {}
    for chunk, factor in sorted(found.items()):
        known = next((other for other in groups if alike([other, factor])), factor)
        groups.setdefault(known, []).append(chunk)
    if len(groups) < 2:
        return ""
    lanes = [list(dict.fromkeys(chunk.lane for chunk in each)) for each in groups.values()]
    if len(groups) == len(Lane) and all(len(each) == 1 for each in lanes) and lanes[0] != lanes[1]:
        shown = " and ".join(f"by {factor:.4g} in lane {lane}" for factor, (lane,) in zip(groups, lanes, strict=True))
        why = "Is only one chunk of each rank scaled or clipped?"
    else:
        shown = " and ".join(
            f"by {factor:.4g} at stage{'s' * (len(each) > 1)} {' '.join(dict.fromkeys(str(c.stage) for c in each))}"
            for factor, each in groups.items()
        )
        why = "Are they divided on some ranks only, or is a gradient scaled before it is sent?"
    return f"with respect to the losses the gradients are scaled differently: {shown}. {why}"


@dataclass(frozen=True)
class Lasts:
    """The losses of one pipeline: for each lane, the weights of those of its microbatches, where they are known."""

    by_lane: Mapping[Lane, tuple[Mapping[str, float] | None, ...]]
    at: str = ""
    """The line that scales one of them, if there is one."""

    @classmethod
    def of(
        cls,
        files: Mapping[int, Mapping[str, Any]],
        logs: Sequence[RankLog],
        tasks: Mapping[ForwardId, Task],
        routes: Mapping[Lane, tuple[int, ...]],
    ) -> Lasts:
        """Those in the files of a pipeline's ranks; ``logs`` are those of the same ranks."""
        found = {}
        for lane, route in routes.items():
            last = sorted((task.mb, id) for id, task in tasks.items() if task.chunk == Chunk(lane, len(route) - 1))
            kept = files[route[-1]].get("loss weights", {})
            found[lane] = tuple(_one(kept.get(logs[id.rank].find(id.number), ())) for _, id in last)
        scaled = (at for route in routes.values() for at in files[route[-1]].get("scaled", {}).values())
        return cls(found, next(filter(None, scaled), ""))


def weights_of(
    own: Lasts,
    others: Sequence[Lasts],
    chunks: Sequence[ChunkComparison],
    reduced: bool,
    expected: str | None = None,
    clipping: float | None = 1.0,
) -> LossWeights:
    """The weights with which the losses enter the gradient.

    ``own`` are the losses of the pipeline and ``others`` those of the other ones; the gradients may be summed over all
    of them.  ``reduced`` is whether they are not reduced any further, over ranks outside of the pipeline.  ``expected``
    is ``mean`` or ``sum`` if the user says that the gradient is that of the microbatches.  ``clipping`` is the factor
    of the clipping alone, ``None`` if it is not known.
    """
    if clipping is None:
        return LossWeights({}, "", expected, clipped=True)
    values = [factor / clipping for factor in factors(chunks).values()]
    over = {each.pipelines for each in chunks}
    every = [own, *others] if over == {1 + len(others)} else [own]
    entries = [one for each in every for lane in each.by_lane.values() for one in lane]
    known = [one for one in entries if one is not None]
    certain = bool(values) and all(alike([values[0], value]) for value in values) and bool(known)
    if not certain or len(known) < len(entries) or len(over) > 1 or not (reduced or len(every) > 1):
        return LossWeights({}, "", expected)
    summed = any(each.summed for each in chunks)
    lanes = [[one for each in every for one in each.by_lane[lane] if one is not None] for lane in own.by_lane]
    groups = [known] if summed else lanes
    reductions = {_reduction(group, values[0]) for group in groups}
    if "other" in reductions and any(not alike([clipping, each.scale]) for each in chunks) and clipping == 1.0:
        return LossWeights({}, "", expected)  # they may be clipped
    shown = {
        lane: tuple(_shown(one) * values[0] for one in group) for lane, group in zip(own.by_lane, lanes, strict=True)
    }
    reduction = reductions.pop() if len(reductions) == 1 else ""
    return LossWeights(shown, reduction, expected, summed, scaled=values[0], at=own.at, scale=clipping)


def _one(found: Sequence[Mapping[str, float] | None]) -> Mapping[str, float] | None:
    """The weight of a forward: that of its only loss, or of several alike."""
    if not found or any(one is None or one != found[0] for one in found):
        return None
    return found[0]


def _reduction(group: Sequence[Mapping[str, float]], factor: float) -> str:
    """Whether the weights, times ``factor``, make a mean or a sum; ``other`` for neither, empty if that is uncertain.

    The weights are those of each whole loss, or of the mean of its elements: a loss that sums its tokens and is divided
    by the number of all tokens is a mean, too.
    """
    ways = [key for key in ("whole", "mean") if all(key in one for one in group)]
    is_mean = any(alike([1.0, sum(one[key] * factor for one in group)]) for key in ways)
    is_sum = any(all(alike([1.0, one[key] * factor]) for one in group) for key in ways)
    certain = all(one["certain"] for one in group)
    if is_mean and is_sum:
        return "mean" if len(group) == 1 else ""
    return "mean" if is_mean else "" if not certain else "sum" if is_sum else "other"


def _shown(one: Mapping[str, float]) -> float:
    return one.get("whole", one["mean"])
