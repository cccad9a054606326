"""A recorded step compared with its plain run: how each chunk's outputs, links and gradients agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.phrases import counted
from dualpipe.record.plain import links
from dualpipe.record.plain.gradients import Agreement, Parts, agreement, equal, factors_of, scale_of
from dualpipe.record.plain.links import Plainly
from dualpipe.schedule import B, Chunk, Lane, Op, Task, W

_MOST_NAMES = 3


@dataclass(frozen=True)
class Step:
    """One training step of a pipeline: the files of its ranks, and what they have for each forward."""

    files: Mapping[int, Mapping[str, Any]]
    forwards: Mapping[Task, Plainly]
    routes: Mapping[Lane, tuple[int, ...]]
    microbatches: Mapping[Lane, int]
    others: bool
    """Whether there are ranks outside of these routes, as those of other data-parallel pipelines."""
    places: Mapping[Op, str]
    replicas: tuple[Step, ...] = ()
    """The other pipelines of the job, if all are recorded."""
    foreign: Mapping[Op, bool] = field(default_factory=dict)
    """The sends of what no stage made, and whether that is certainly something else."""

    def chunk(self, chunk: Chunk) -> ChunkComparison:
        rank, count = self.routes[chunk.lane][chunk.stage], self.microbatches[chunk.lane]
        file = self.files[rank]
        if "error" in file:
            return ChunkComparison(chunk, rank, count, (), (str(file["error"]),), ())
        faults: list[str] = []
        unknown: list[str] = [] if count else ["no microbatch was recorded"]
        outside: list[str] = []
        near: list[str] = []
        for mb in range(count):
            found = self.forwards.get(Task(*chunk, mb))
            if found is None:
                faults.append(f"microbatch {mb} ran no forward")
            elif "error" in found:
                unknown.append(f"microbatch {mb} cannot be run plainly: {found['error']}")
            elif not links.all_equal(found["returned"], found["plainly"]):
                what = f"the output of microbatch {mb} differs from the plain one"
                if changed := found.get("changed"):
                    faults.append(f"{what}: {_names(changed)} had changed since the step began")
                else:
                    unknown.append(f"{what}, on the same input and weights: does its module keep a state of its own?")
            else:
                lists = {"fault": faults, "unknown": unknown, "outside": outside, "near": near}
                for which, what in links.differences(Task(*chunk, mb), found, self.forwards, self.foreign):
                    lists[which].append(what)
        if unknown:
            return ChunkComparison(chunk, rank, count, _shown(faults), _shown(unknown), ())
        kept = self._gradients(chunk, rank)
        if isinstance(kept, Agreement):
            notes = (*([kept.how] if kept.how else []), *self._on_links(outside, near))
            return ChunkComparison(
                chunk, rank, count, _shown(faults), (), notes, kept.summed, kept.scale, kept.divided_by
            )
        if summed := self._over_pipelines(chunk):
            return ChunkComparison(chunk, rank, count, _shown(faults), (), (summed, *self._on_links(outside, near)))
        if self.others:
            unknown.append(f"{kept}, which may be the sum over pipelines that are not in the file")
        else:
            faults.append(kept)
        return ChunkComparison(chunk, rank, count, _shown(faults), (*_shown(outside), *unknown), ())

    @staticmethod
    def _on_links(outside: Sequence[str], near: Sequence[str]) -> Iterator[str]:
        if near:
            yield f"{counted(len(near), 'link agrees', 'links agree')} with the neighbouring stages up to rounding"
        if outside:
            yield (
                f"{len(outside)} links to neighbouring stages are not compared, because tensors are computed further "
                "outside of its module"
            )

    def _over_pipelines(self, chunk: Chunk) -> str:
        """A note if the gradients are those of all pipelines of the job, summed and perhaps divided."""
        file = self.files[self.routes[chunk.lane][chunk.stage]]
        every = [each for each in self.replicas if each.has(chunk)]
        if not every or len(every) < len(self.replicas):
            return ""
        of_others = [each.parts_by_name(chunk) for each in every]
        found: set[int] = set()
        for number, parts in self._parts(chunk).items():
            alike = [named.get(file["names"][number]) for named in of_others]
            final = file["final"][number]
            if final is None or parts.slopes or not all(alike):
                return ""
            by = _divisor(final, [parts, *filter(None, alike)], (1, 1 + len(every), *self._counts()))
            if by is None:
                return ""
            found.add(by)
        if len(found) != 1:
            return ""
        by = found.pop()
        return f"summed over {1 + len(every)} pipelines{f' and divided by {by}' if by > 1 else ''}, up to rounding"

    def has(self, chunk: Chunk) -> bool:
        """Whether there is such a chunk, and its rank has made a plain run."""
        route = self.routes.get(chunk.lane, ())
        return chunk.stage < len(route) and "error" not in self.files[route[chunk.stage]]

    def parts_by_name(self, chunk: Chunk) -> dict[str, Parts]:
        names = self.files[self.routes[chunk.lane][chunk.stage]]["names"]
        return {names[number]: parts for number, parts in self._parts(chunk).items()}

    def _gradients(self, chunk: Chunk, rank: int) -> str | Agreement:
        """How the gradients of a chunk agree with the plain ones, or what differs."""
        file = self.files[rank]
        agree: list[Agreement] = []
        wrong: dict[str, list[str]] = {}
        shared = self._shared(chunk)
        fitted = [factors_of(file["final"][number], parts) for number, parts in self._parts(chunk).items()]
        patterns = [factors for factors in fitted if factors]
        for number, parts in self._parts(chunk).items():
            name = file["names"][number]
            if number in shared:
                agree.append(Agreement(f"{name} is used by another stage of the rank too, and not compared"))
                continue
            final = file["final"][number]
            found = self._wrong(chunk, number) or agreement(
                final, parts, self._counts(), self._scales, patterns, partial(self._place, chunk)
            )
            if not isinstance(found, Agreement) and (tied := self._tied(chunk, number, final)):
                found = Agreement(tied)
            if isinstance(found, Agreement) and parts.before is not None:
                found = _with_earlier(found, file["step"])
            if isinstance(found, Agreement):
                agree.append(found)
            else:
                wrong.setdefault(found, []).append(name)
        scales = {round(each.scale, 3) for each in agree if each.how or each.summed is not None or each.scale != 1}
        if wrong:
            return "; ".join(f"{_names(names)}: {what}" for what, names in wrong.items())
        if len(scales) > 1:
            shown = " and ".join(f"{scale:g}" for scale in sorted(scales))
            return f"the gradients of its parameters are scaled by different factors: {shown}"
        summed = {each.summed for each in agree if each.summed is not None}
        notes = {each.how for each in agree if each.how}
        scale = next((each.scale for each in agree if each.scale != 1), 1.0)
        divided = {each.divided_by for each in agree}
        by = divided.pop() if len(divided) == 1 else 1
        return Agreement(", ".join(sorted(notes)), summed.pop() if len(summed) == 1 else None, scale, by)

    @cached_property
    def _scales(self) -> tuple[float, ...]:
        """The factors that the program has scaled gradients by, where a gradient is large enough to show it."""
        found: list[float] = []
        for lane, route in self.routes.items():
            for stage, rank in enumerate(route):
                final = self.files[rank].get("final", {})
                for number, parts in self._parts(Chunk(lane, stage)).items() if final else ():
                    scale = scale_of(final[number], parts)
                    if scale is not None and all(abs(scale - other) > 1e-4 * abs(other) for other in (1.0, *found)):
                        found.append(scale)
        return tuple(found)

    def is_summed(self, chunk: Chunk) -> bool | None:
        """Whether the gradients of a chunk have a part of its replica's; ``None`` if that does not show."""
        final = self.files[self.routes[chunk.lane][chunk.stage]].get("final", {})
        found = [factors_of(final[number], parts) for number, parts in self._parts(chunk).items() if final]
        far = [factor for each in found if each for (lane, _), factor in each.items() if lane is not chunk.lane]
        return any(far) if far else None

    def _place(self, chunk: Chunk, mb: int) -> str:
        """The line of the program for the W of a microbatch, or else for its B."""
        for kind in (W, B):
            if at := self.places.get(Op(kind, *chunk, mb)):
                return f"{Op(kind, *chunk, mb)} is at {at}"
        return ""

    def _wrong(self, chunk: Chunk, number: int) -> str:
        """Where the program's own computation of a weight gradient is no derivative of its module."""
        for task, found in self.forwards.items():
            if task.chunk == chunk and number in found.get("wrong", {}):
                own, slope = found["wrong"][number]
                times = f", {own / slope:.3g} times as much" if slope else ""
                return (
                    f"what the program computes as the gradient of one microbatch has a slope of {own:.4g}{times}, and "
                    f"the module's is {slope:.4g}: is the formula of W right, and run once for each use of the weight?"
                )
        return ""

    def _counts(self) -> tuple[int, ...]:
        """What a program may divide gradients by: microbatches, replicas."""
        counts = {2, *self.microbatches.values(), sum(self.microbatches.values())}
        return tuple(sorted({count for one in counts for count in (one, 2 * one) if count > 1}))

    def _parts(self, chunk: Chunk) -> dict[int, Parts]:
        """The gradients of every parameter of a chunk, microbatch by microbatch."""
        file = self.files[self.routes[chunk.lane][chunk.stage]]
        own, slopes = self._by_microbatch(chunk)
        lane = next((lane for lane in self.routes if lane != chunk.lane), None)
        far: dict[str, dict[int, Tensor | None]] = {}
        far_slopes: dict[str, dict[int, float]] = {}
        if lane is not None:
            names = self.files[self.routes[lane][chunk.stage]].get("names", [])
            of_lane, slopes_of_lane = self._by_microbatch(Chunk(lane, chunk.stage))
            far = {names[number]: each for number, each in of_lane.items()}
            far_slopes = {names[number]: each for number, each in slopes_of_lane.items()}
        return {
            number: Parts(
                number,
                chunk.lane,
                each,
                None if lane is None else far.get(file["names"][number], {}),
                file["before"].get(number),
                slopes.get(number, {}),
                far_slopes.get(file["names"][number], {}),
            )
            for number, each in own.items()
        }

    def _by_microbatch(self, chunk: Chunk) -> tuple[dict[int, dict[int, Tensor | None]], dict[int, dict[int, float]]]:
        """By parameter and microbatch the plain gradients of a chunk, and the slopes in place of some."""
        gradients: dict[int, dict[int, Tensor | None]] = {}
        slopes: dict[int, dict[int, float]] = {}
        for mb in range(self.microbatches[chunk.lane]):
            found = self.forwards.get(Task(*chunk, mb)) or {}
            for number, gradient in found.get("weights", {}).items():
                gradients.setdefault(number, {})[mb] = gradient
            for number, slope in found.get("slopes", {}).items():
                slopes.setdefault(number, {})[mb] = slope
        return gradients, slopes

    def _shared(self, chunk: Chunk) -> set[int]:
        """The parameters that another stage on the rank uses as well: in which order both add to them is not fixed."""
        rank = self.routes[chunk.lane][chunk.stage]
        users: dict[int, set[Chunk]] = {}
        for task, found in self.forwards.items():
            if self.routes[task.lane][task.stage] == rank:
                for number in found.get("weights", {}):
                    users.setdefault(number, set()).add(task.chunk)
        return {number for number, chunks in users.items() if len(chunks) > 1}

    def _tied(self, chunk: Chunk, number: int, final: Tensor | None) -> str:
        """The parameter of another stage with which a gradient was summed, as those of tied embeddings are."""
        own = self._parts(chunk)[number].total(final)
        others = [Chunk(lane, stage) for lane, route in self.routes.items() for stage in range(len(route))]
        for other in (each for each in others if each != chunk):
            for at, parts in self._parts(other).items():
                total = parts.total(final)
                if own is not None and total is not None and total.shape == own.shape and equal(final, own + total):
                    mine, theirs = self._name(chunk, number), self._name(other, at)
                    return f"{mine} is summed with {theirs} of stage {other.stage}, to which it is tied"
        return ""

    def _name(self, chunk: Chunk, number: int) -> str:
        return str(self.files[self.routes[chunk.lane][chunk.stage]]["names"][number])


def _with_earlier(found: Agreement, step: int) -> Agreement | str:
    """The agreement of a gradient that was not zero before the step, or what is wrong with that."""
    if step > 1:
        return "the gradient includes that of an earlier step: is it set to zero or None after the optimizer's step?"
    return found._replace(how=", ".join(filter(None, (found.how, "added to what was there before the step"))))


def _divisor(final: Tensor, every: Sequence[Parts], counts: Sequence[int]) -> int | None:
    """By what a gradient is divided that is otherwise the sum over pipelines, of one lane or of both."""
    for of_both in (False, True):
        totals = [parts.total(final, of_other=far) for parts in every for far in (False, True)[: 1 + of_both]]
        there = [total.double() for total in totals if total is not None]
        if not there or any(total.shape != final.shape for total in there):
            continue
        total = torch.stack(there).sum(0)
        for by in counts:
            if float((final.double() * by - total).abs().max()) <= links.ROUNDING * float(total.abs().max()):
                return by
    return None


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _shown(found: Sequence[str]) -> tuple[str, ...]:
    """The first of several findings of one kind, and how many there are more."""
    more = len(found) - _MOST_NAMES
    return (*found[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else []))
