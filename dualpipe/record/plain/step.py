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
from dualpipe.record.plain.links import ROUNDING, Plainly
from dualpipe.record.plain.names import unique
from dualpipe.record.plain.sums import Partner, Replica, Summed, agreement_of_all, factor_of_shards
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
        alone: list[str] = []
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
                lists = {"fault": faults, "unknown": unknown, "outside": outside, "near": near, "alone": alone}
                for which, what in links.differences(Task(*chunk, mb), found, self.forwards, self.foreign):
                    lists[which].append(what)
        if unknown:
            return ChunkComparison(chunk, rank, count, _shown(faults), _shown(unknown), ())
        on_links = self._on_links(outside, near, alone)
        kept = self._gradients(chunk, rank)
        if not isinstance(kept, Agreement):
            kept = self._of_all(chunk) or self._in_shards(chunk) or kept
        if isinstance(kept, Agreement):
            notes = (*([kept.how] if kept.how else []), *on_links)
            agreed = kept.summed, kept.scale, kept.divided_by, kept.pipelines, kept.copies, kept.squares
            return ChunkComparison(chunk, rank, count, _shown(faults), (), notes, *agreed)
        if self.others:
            unknown.append(f"{kept}, which may be the sum over pipelines that are not in the file")
        else:
            faults.append(kept)
        return ChunkComparison(chunk, rank, count, _shown(faults), (*_shown(outside), *unknown), ())

    @staticmethod
    def _on_links(outside: Sequence[str], near: Sequence[str], alone: Sequence[str]) -> Iterator[str]:
        if near:
            yield f"{counted(len(near), 'link agrees', 'links agree')} with the neighbouring stages up to rounding"
        if outside:
            yield (
                f"{len(outside)} links to neighbouring stages are not compared, because tensors are computed further "
                "outside of its module"
            )
        if alone:
            are = counted(len(alone), "link is", "links are")
            yield f"{are} not compared, because the stage at the other end could not be run plainly"

    def _of_all(self, chunk: Chunk) -> Agreement | None:
        """How all gradients of a chunk agree with one factor times sums, over all pipelines of the job if any."""
        if any(not each.has(chunk) for each in self.replicas):
            return None
        file, names = self._file(chunk), self._names(chunk)
        of_others = [each.parts_by_name(chunk) for each in self.replicas]
        parameters: list[Summed] = []
        for number, parts in self._parts(chunk).items():
            alike = [named.get(names[number]) for named in of_others]
            final = file["final"][number]
            if final is None or parts.slopes or parts.before is not None or not all(alike):
                return None
            every = [parts, *filter(None, alike)]
            parameters.append(Summed(number, final, every, partial(self._partners, chunk, number)))
        counts = (1, *sorted({1 + len(of_others), *self._counts()}))
        return agreement_of_all(parameters, chunk.stage, len(self.routes) > 1, counts) if parameters else None

    def _in_shards(self, chunk: Chunk) -> Agreement | None:
        """How the gradients agree if each replica of the stage, on a lane or in a pipeline, sums a shard of them."""
        every = [(step, Chunk(lane, chunk.stage)) for step in (self, *self.replicas) for lane in step.routes]
        if any(not step.has(each) for step, each in every):
            return None
        replicas: list[Replica] = []
        for step, each in every:
            names, final = step._names(each), step._file(each)["final"]
            own = {number: parts.total(final[number]) for number, parts in step._parts(each).items()}
            replicas.append({names[n]: (final[n], t) for n, t in own.items() if t is not None and final[n] is not None})
        if any(len(each) < len(self._names(chunk)) for each in replicas):
            return None
        found = ((by, factor_of_shards(replicas, by)) for by in (1, len(replicas), *self._counts()))
        by, factor = next(((by, factor) for by, factor in found if factor is not None), (1, None))
        if factor is None:
            return None
        clipped = abs(factor - 1) > ROUNDING
        how = [f"summed in shards, one on each of {len(replicas)} replicas"]
        how += [f"scaled by {factor / by:.4g}"] if clipped else [f"divided by {by}"] if by > 1 else []
        sums = [torch.stack([each[name][1].double() for each in replicas]).sum(0) for name in replicas[0]]
        return Agreement(
            f"{' and '.join(how)}, up to rounding",
            True if len(self.routes) > 1 else None,
            factor / by if clipped else 1.0,
            pipelines=1 + len(self.replicas),
            squares=sum(float(each.square().sum()) for each in sums) * (factor / by) ** 2,
        )

    def _partners(self, chunk: Chunk, number: int) -> Iterator[Partner]:
        """The parameters of other stages, to which one may be tied as the embedding is to the output layer.

        Tied weights are equal before the step.  So a gradient that is summed over stages by mistake is no such sum.
        """
        value = self._file(chunk).get("weights", {}).get(number)
        if value is None or not value.numel() or bool((value == value.reshape(-1)[0]).all()):
            return
        for stage in range(len(self.routes[chunk.lane])):
            other = Chunk(chunk.lane, stage)
            if stage == chunk.stage or any(not each.has(other) for each in (self, *self.replicas)):
                continue
            names, values = self._names(other), self._file(other).get("weights", {})
            of_others = [each.parts_by_name(other) for each in self.replicas]
            for at, parts in self._parts(other).items():
                if not equal(value, values.get(at)):
                    continue
                alike = [named[names[at]] for named in of_others if names[at] in named]
                words = f"{self._name(chunk, number)} is summed with {names[at]} of stage {stage}, to which it is tied"
                yield Partner(words, stage, [parts, *alike])

    def has(self, chunk: Chunk) -> bool:
        """Whether there is such a chunk, and its rank has made a plain run."""
        route = self.routes.get(chunk.lane, ())
        return chunk.stage < len(route) and "error" not in self.files[route[chunk.stage]]

    def parts_by_name(self, chunk: Chunk) -> dict[str, Parts]:
        names = self._names(chunk)
        return {names[number]: parts for number, parts in self._parts(chunk).items()}

    def _file(self, chunk: Chunk) -> Mapping[str, Any]:
        return self.files[self.routes[chunk.lane][chunk.stage]]

    def _names(self, chunk: Chunk) -> dict[int, str]:
        """The names of the chunk's parameters by number."""
        return unique(self._by_microbatch(chunk)[0], self._file(chunk).get("names", ()))

    def _gradients(self, chunk: Chunk, rank: int) -> str | Agreement:
        """How the gradients of a chunk agree with the plain ones, or what differs."""
        file, names = self.files[rank], self._names(chunk)
        agree: list[Agreement] = []
        wrong: dict[str, list[str]] = {}
        shared = self._shared(chunk)
        fitted = [factors_of(file["final"][number], parts) for number, parts in self._parts(chunk).items()]
        patterns = [factors for factors in fitted if factors]
        for number, parts in self._parts(chunk).items():
            name = names[number]
            if number in shared:
                agree.append(Agreement(f"{name} is used by another stage of the rank too, and not compared"))
                continue
            final = file["final"][number]
            found = self._wrong(chunk, number) or agreement(
                final, parts, self._counts(), self._scales, patterns, partial(self._place, chunk)
            )
            if not isinstance(found, Agreement) and (tie := self._tied(chunk, number, final)):
                found = Agreement(tie.words, copies=frozenset([number] * (tie.stage < chunk.stage)))
            if isinstance(found, Agreement) and parts.before is not None:
                found = _with_earlier(found, file["step"])
            if isinstance(found, Agreement):
                agree.append(found)
            else:
                wrong.setdefault(found, []).append(name)
        scales = {round(each.scale, 3) for each in agree if each.how or each.summed is not None or each.scale != 1}
        if wrong:
            return "; ".join(_shown([f"{_names(names)}: {what}" for what, names in wrong.items()]))
        if len(scales) > 1:
            shown = " and ".join(f"{scale:g}" for scale in sorted(scales))
            return f"the gradients of its parameters are scaled by different factors: {shown}"
        summed = {each.summed for each in agree if each.summed is not None}
        notes = {each.how for each in agree if each.how}
        scale = next((each.scale for each in agree if each.scale != 1), 1.0)
        divided = {each.divided_by for each in agree}
        by = divided.pop() if len(divided) == 1 else 1
        copies = frozenset(number for each in agree for number in each.copies)
        how = ", ".join(sorted(notes))
        return Agreement(how, summed.pop() if len(summed) == 1 else None, scale, by, copies=copies)

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
        file, names = self._file(chunk), self._names(chunk)
        own, slopes = self._by_microbatch(chunk)
        lane = next((lane for lane in self.routes if lane != chunk.lane), None)
        far: dict[str, dict[int, Tensor | None]] = {}
        far_slopes: dict[str, dict[int, float]] = {}
        if lane is not None:
            replica = Chunk(lane, chunk.stage)
            of_replica = self._names(replica)
            of_lane, slopes_of_lane = self._by_microbatch(replica)
            far = {of_replica[number]: each for number, each in of_lane.items()}
            far_slopes = {of_replica[number]: each for number, each in slopes_of_lane.items()}
        return {
            number: Parts(
                number,
                chunk.lane,
                each,
                None if lane is None else far.get(names[number], {}),
                file["before"].get(number),
                slopes.get(number, {}),
                far_slopes.get(names[number], {}),
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

    def _tied(self, chunk: Chunk, number: int, final: Tensor | None) -> Partner | None:
        """The parameter of another stage with which a gradient was summed, as those of tied embeddings are."""
        own = self._parts(chunk)[number].total(final)
        for each in self._partners(chunk, number) if own is not None else ():
            total = each.every[0].total(final)
            if own is not None and total is not None and total.shape == own.shape and equal(final, own + total):
                return each
        return None

    def _name(self, chunk: Chunk, number: int) -> str:
        return self._names(chunk)[number]


def _with_earlier(found: Agreement, step: int) -> Agreement | str:
    """The agreement of a gradient that was not zero before the step, or what is wrong with that."""
    if step > 1:
        return "the gradient includes that of an earlier step: is it set to zero or None after the optimizer's step?"
    return found._replace(how=", ".join(filter(None, (found.how, "added to what was there before the step"))))


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _shown(found: Sequence[str]) -> tuple[str, ...]:
    """The first of several findings of one kind, and how many there are more."""
    more = len(found) - _MOST_NAMES
    return (*found[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else []))
