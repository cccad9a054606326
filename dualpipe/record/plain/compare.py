"""Compare a recorded step with a plain run of the same modules on the same microbatches.

Every rank has run its modules once more, one microbatch after the other (``dualpipe.record.child.plain``), on what they
took in the recorded step.  Here the ranks' files are put together:

links      what a stage took for a microbatch is bitwise what the stage before it returns for that microbatch, and the
           gradient that its output got is bitwise what the backward of the stage after it gives
outputs    what a module returned is bitwise what it returns plainly
gradients  the gradient of each parameter is bitwise the sum over the microbatches, in their order

If all hold, the step has computed what one process computes without a schedule, by induction over the stages.  The
gradient of the last stage's output is taken from the recorded step, since the loss may be computed by any code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualpipe.record.comparison import ChunkComparison, Comparison
from dualpipe.record.events import ForwardId, RankLog
from dualpipe.record.plain.clipping import judge
from dualpipe.record.plain.gradients import Agreement, Parts, agreement, equal, factors_of, scale_of
from dualpipe.record.plain.losses import losses_of
from dualpipe.record.plain.replicas import differences
from dualpipe.record.recording import Recording
from dualpipe.schedule import SB, SF, B, Chunk, Lane, Op, Task, W

_MOST_NAMES = 3
_ROUNDING = 1e-4
"""How far a sum in another order may be off, relative to its largest element."""

Plainly = Mapping[str, Any]
"""What a rank's file has for one forward."""


def add_comparison(
    recording: Recording,
    folder: Path,
    logs: Sequence[RankLog],
    clip_norm: float | None = None,
    pipelines: Sequence[Recording] = (),
) -> Recording:
    """The recording with its comparison; ``logs`` are those of all ranks of the job, ``pipelines`` all recordings."""
    schedule = recording.schedule
    places = {placed.op: schedule.observed.place(placed) for placed in schedule if placed.op.kind in (B, W)}
    ranks = recording.pipeline_ranks
    others = [(each.tasks, each.schedule.routes, each.pipeline_ranks) for each in pipelines if each is not recording]
    of_job = ranks or range(schedule.ranks)
    sent = [(op.bare, logs[of_job[id.rank]].messages[id.number]) for id, op in recording.messages.items()]
    foreign = {
        op: bool(message.weights)
        for op, message in sent
        if message.send and not message.activation_of and not message.gradient_of
    }
    compared = compare(folder, logs, recording.tasks, schedule.routes, ranks, clip_norm, places, others, foreign)
    return replace(recording, comparison=compared)


def compare(
    folder: Path,
    logs: Sequence[RankLog],
    tasks: Mapping[ForwardId, Task],
    routes: Mapping[Lane, tuple[int, ...]],
    ranks: Sequence[int] = (),
    clip_norm: float | None = None,
    places: Mapping[Op, str] | None = None,
    pipelines: Sequence[tuple[Mapping[ForwardId, Task], Mapping[Lane, tuple[int, ...]], Sequence[int]]] = (),
    foreign: Mapping[Op, bool] | None = None,
) -> Comparison:
    """Compare the step of the ``logs`` with the plain runs in the files ``RANK.pt`` of a folder.

    ``ranks`` are the ranks of the job that the recorded pipeline has, in the order of its own; none if it has all.
    ``clip_norm`` is the norm to which the program clips all gradients together, if the user says; ``places`` are the
    lines of the program of B and W.  ``pipelines`` are the tasks, routes and ranks of the other pipelines of the job.
    ``foreign`` are the sends of tensors that no forward or backward of a stage made, and whether they are certainly
    something else, as the gradient of a parameter is.
    """
    others = len(logs) > len({rank for route in routes.values() for rank in route})
    replicas_of = [_step(folder, logs, *each) for each in pipelines]
    if len({*ranks}.union(*(each[2] for each in pipelines))) < len(logs):
        replicas_of = []  # some ranks are in no recording
    step = replace(_step(folder, logs, tasks, routes, ranks, others, places or {}, replicas_of), foreign=foreign or {})
    files, forwards = step.files, step.forwards
    logs = [logs[rank] for rank in ranks or range(len(logs))]
    chunks = tuple(step.chunk(Chunk(lane, stage)) for lane in routes for stage in range(len(routes[lane])))
    losses = tuple(losses_of(files, logs, tasks, routes, chunks))
    clipping = judge(chunks, files, forwards, clip_norm, others)
    replicas = tuple(differences(chunks, files, forwards))
    found = Comparison(chunks, losses, replicas, clipping)
    scaled = any(each.scale != 1 or each.divided_by != 1 for each in chunks)
    steps = {logs[id.rank].forwards[logs[id.rank].find(id.number)].step for id in tasks if id.rank < len(logs)}
    return replace(found, changes=tuple(_changes(logs, steps))) if scaled or found.verdict != "equal" else found


def _step(
    folder: Path,
    logs: Sequence[RankLog],
    tasks: Mapping[ForwardId, Task],
    routes: Mapping[Lane, tuple[int, ...]],
    ranks: Sequence[int],
    others: bool = True,
    places: Mapping[Op, str] | None = None,
    replicas: Sequence[_Step] = (),
) -> _Step:
    """The files of the ranks of one pipeline, and what they have for each of its forwards."""
    ranks = ranks or range(len(logs))
    logs = [logs[rank] for rank in ranks]
    files = {rank: _load(folder / f"{ranks[rank]}.pt") for route in routes.values() for rank in route}
    forwards: dict[Task, Plainly] = {}
    for id, task in sorted(tasks.items()):
        file, number = files.get(id.rank, {}), logs[id.rank].find(id.number)
        found = file.get("forwards", {}).get(number)
        if found is not None:
            forwards[task] = found | {"layers": file.get("layers", {}).get(number, {})}
    counts = {lane: 1 + max((t.mb for t in tasks.values() if t.lane == lane), default=-1) for lane in routes}
    return _Step(files, forwards, routes, counts, others, places or {}, tuple(replicas))


def _changes(logs: Sequence[RankLog], steps: Collection[int]) -> Iterator[str]:
    """Where each rank changes gradients in place during the steps."""
    for log in logs:
        counts = Counter((name, at) for name, at, step in log.changed if step in steps)
        shown = [f"{name} at {at}{f' ({count} times)' if count > 1 else ''}" for (name, at), count in counts.items()]
        if shown:
            yield f"rank {log.rank} changes gradients in place: {', '.join(shown)}"


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"error": "it made no plain run: no forward was observed, or the rank did not end its step"}
    content: dict[str, Any] = torch.load(path, weights_only=True)
    after = path.with_name(f"{path.name}.after")
    if after.exists():
        later = torch.load(after, weights_only=True)
        content |= {"changed": later["weights"], "clipped": later["clipped"], "read": later["read"]}
    return content


@dataclass(frozen=True)
class _Step:
    files: Mapping[int, Mapping[str, Any]]
    forwards: Mapping[Task, Plainly]
    routes: Mapping[Lane, tuple[int, ...]]
    microbatches: Mapping[Lane, int]
    others: bool
    """Whether there are ranks outside of these routes, as those of other data-parallel pipelines."""
    places: Mapping[Op, str]
    replicas: tuple[_Step, ...] = ()
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
        for mb in range(count):
            found = self.forwards.get(Task(*chunk, mb))
            if found is None:
                faults.append(f"microbatch {mb} ran no forward")
            elif "error" in found:
                unknown.append(f"microbatch {mb} cannot be run plainly: {found['error']}")
            elif not _all_equal(found["returned"], found["plainly"]):
                what = f"the output of microbatch {mb} differs from the plain one"
                if changed := found.get("changed"):
                    faults.append(f"{what}: {_names(changed)} had changed since the step began")
                else:
                    unknown.append(f"{what}, on the same input and weights: does its module keep a state of its own?")
            else:
                lists = {"fault": faults, "unknown": unknown, "outside": outside}
                for which, what in self._of_microbatch(Task(*chunk, mb), found):
                    lists[which].append(what)
        if unknown:
            return ChunkComparison(chunk, rank, count, _shown(faults), _shown(unknown), ())
        kept = self._gradients(chunk, rank)
        if isinstance(kept, Agreement):
            notes = (*([kept.how] if kept.how else []), *self._uncompared(outside))
            return ChunkComparison(
                chunk, rank, count, _shown(faults), (), notes, kept.summed, kept.scale, kept.divided_by
            )
        if summed := self._over_pipelines(chunk):
            return ChunkComparison(chunk, rank, count, _shown(faults), (), (summed, *self._uncompared(outside)))
        if self.others:
            unknown.append(f"{kept}, which may be the sum over pipelines that are not in the file")
        else:
            faults.append(kept)
        return ChunkComparison(chunk, rank, count, _shown(faults), (*_shown(outside), *unknown), ())

    @staticmethod
    def _uncompared(outside: Sequence[str]) -> Iterator[str]:
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

    def _of_microbatch(self, task: Task, found: Plainly) -> Iterator[tuple[str, str]]:
        """What differs for one microbatch, in the links to the neighbour stages and in the outputs.

        Each is a ``fault``, ``unknown``, or computed ``outside`` of any module from what the other stage returns.  The
        last is no fault, unless it is what some stage returns for another microbatch.
        """
        before = self.forwards.get(task._replace(stage=task.stage - 1))
        after = self.forwards.get(task._replace(stage=task.stage + 1))
        if before is not None and not _among(found["took"], before.get("plainly", [])):
            what = f"microbatch {task.mb} does not take what stage {task.stage - 1} returns for it"
            known = _another(found["took"], (each.get("returned", []) for each in self.forwards.values()))
            which = "fault" if known else self._which(Op(SF, task.lane, task.stage - 1, task.mb))
            yield which, what if which == "fault" else f"{what}: is that computed further outside of a module?"
        if not found["ran"]:
            yield "fault", f"no gradient reaches microbatch {task.mb}"
        elif after is not None and not _among(found["gradients"], after.get("input gradients", [])):
            what = f"microbatch {task.mb} does not take the gradient that stage {task.stage + 1} has for it"
            others = (each.get("input gradients", []) for each in self.forwards.values())
            known = _another(found["gradients"], others)
            which = "fault" if known else self._which(Op(SB, task.lane, task.stage + 1, task.mb))
            yield which, what if which == "fault" else f"{what}: is the output computed further outside of a module?"

    def _which(self, send: Op) -> str:
        """What it means that another tensor than that of the stage arrives by a send."""
        if send not in self.foreign:
            return "outside"
        return "fault" if self.foreign[send] else "unknown"

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
            if float((final.double() * by - total).abs().max()) <= _ROUNDING * float(total.abs().max()):
                return by
    return None


def _all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(equal, one, other))


def _among(taken: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> bool:
    """Whether every tensor is bitwise one of the others, whatever its shape."""
    flat = [tensor.reshape(-1) for tensor in given if tensor is not None]
    return all(any(equal(tensor.reshape(-1), other) for other in flat) for tensor in taken if tensor is not None)


def _another(taken: Sequence[Tensor | None], of_others: Iterator[Sequence[Tensor | None]]) -> bool:
    """Whether all tensors are among those of one of the others."""
    return any(tensor is not None for tensor in taken) and any(_among(taken, given) for given in of_others)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _shown(found: Sequence[str]) -> tuple[str, ...]:
    """The first of several findings of one kind, and how many there are more."""
    more = len(found) - _MOST_NAMES
    return (*found[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else []))
