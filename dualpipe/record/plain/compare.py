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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualpipe.record.comparison import ChunkComparison, Comparison, LossComparison
from dualpipe.record.events import ForwardId, RankLog
from dualpipe.record.recording import Recording
from dualpipe.schedule import Chunk, Lane, Task

_MOST_NAMES = 3
_MOST_TRIED = 64
"""Up to so many microbatches each is tried as the one that a sum lacks."""

Plainly = Mapping[str, Any]
"""What a rank's file has for one forward."""


def add_comparison(recording: Recording, folder: Path, logs: Sequence[RankLog]) -> Recording:
    """The recording with its comparison; ``logs`` are those of all ranks of the job."""
    compared = compare(folder, logs, recording.tasks, recording.schedule.routes, recording.pipeline_ranks)
    return replace(recording, comparison=compared)


def compare(
    folder: Path,
    logs: Sequence[RankLog],
    tasks: Mapping[ForwardId, Task],
    routes: Mapping[Lane, tuple[int, ...]],
    ranks: Sequence[int] = (),
) -> Comparison:
    """Compare the step of the ``logs`` with the plain runs in the files ``RANK.pt`` of a folder.

    ``ranks`` are the ranks of the job that the recorded pipeline has, in the order of its own; none if it has all.
    """
    others = len(logs) > len({rank for route in routes.values() for rank in route})
    ranks = ranks or range(len(logs))
    logs = [logs[rank] for rank in ranks]
    files = {rank: _load(folder / f"{ranks[rank]}.pt") for route in routes.values() for rank in route}
    forwards: dict[Task, Plainly] = {}
    for id, task in sorted(tasks.items()):
        found = files[id.rank].get("forwards", {}).get(logs[id.rank].find(id.number)) if id.rank in files else None
        if found is not None:
            forwards[task] = found
    counts = {lane: 1 + max((t.mb for t in tasks.values() if t.lane == lane), default=-1) for lane in routes}
    step = _Step(files, forwards, routes, counts, others)
    chunks = tuple(step.chunk(Chunk(lane, stage)) for lane in routes for stage in range(len(routes[lane])))
    return Comparison(chunks, tuple(_losses(files, logs, tasks, routes)), tuple(_replicas(chunks, files)))


def _load(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"error": "it made no plain run: no forward was observed, or the rank did not end its step"}
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


@dataclass(frozen=True)
class _Step:
    files: Mapping[int, Mapping[str, Any]]
    forwards: Mapping[Task, Plainly]
    routes: Mapping[Lane, tuple[int, ...]]
    microbatches: Mapping[Lane, int]
    others: bool
    """Whether there are ranks outside of these routes, as those of other data-parallel pipelines."""

    def chunk(self, chunk: Chunk) -> ChunkComparison:
        rank, count = self.routes[chunk.lane][chunk.stage], self.microbatches[chunk.lane]
        file = self.files[rank]
        if "error" in file:
            return ChunkComparison(chunk, rank, count, (), (str(file["error"]),), ())
        faults: list[str] = []
        unknown: list[str] = [] if count else ["no microbatch was recorded"]
        for mb in range(count):
            found = self.forwards.get(Task(*chunk, mb))
            if found is None:
                faults.append(f"microbatch {mb} ran no forward")
            elif "error" in found:
                unknown.append(f"microbatch {mb} cannot be run plainly: {found['error']}")
            else:
                faults += self._of_microbatch(Task(*chunk, mb), found)
        if unknown:
            return ChunkComparison(chunk, rank, count, _shown(faults), _shown(unknown), ())
        notes, summed = [], None
        kept = self._gradients(chunk, rank)
        if isinstance(kept, str) and self.others:
            unknown.append(f"{kept}, which may be the sum over pipelines that are not in the file")
        elif isinstance(kept, str):
            faults.append(kept)
        else:
            summed, note = kept
            notes += [note] if note else []
        return ChunkComparison(chunk, rank, count, _shown(faults), tuple(unknown), tuple(notes), summed)

    def _of_microbatch(self, task: Task, found: Plainly) -> Iterator[str]:
        """What differs for one microbatch: the links to the neighbour stages, and the outputs."""
        before = self.forwards.get(task._replace(stage=task.stage - 1))
        after = self.forwards.get(task._replace(stage=task.stage + 1))
        if before is not None and not _among(found["took"], before.get("plainly", [])):
            yield f"microbatch {task.mb} does not take what stage {task.stage - 1} returns for it"
        if not _all_equal(found["returned"], found["plainly"]):
            yield f"the output of microbatch {task.mb} differs from the plain one"
        if not found["ran"]:
            yield f"no gradient reaches microbatch {task.mb}"
        elif after is not None and not _among(found["gradients"], after.get("input gradients", [])):
            yield f"microbatch {task.mb} does not take the gradient that stage {task.stage + 1} has for it"

    def _gradients(self, chunk: Chunk, rank: int) -> str | tuple[bool | None, str]:
        """What differs in the gradients of a chunk, or whether they are sums over both lanes, and how they agree."""
        file = self.files[rank]
        sums = self._sums(chunk)
        other = self._other(chunk)
        agree: set[tuple[str, bool | None]] = set()
        wrong: dict[str, list[str]] = {}
        shared = self._shared(chunk)
        for number, own in sums.items():
            if number in shared:
                agree.add((f"{file['names'][number]} is used by another stage of the rank too, and not compared", None))
                continue
            final = file["final"][number]
            name = file["names"][number]
            both = None if other is None else _added(own, other.get(name))
            found = _agreement(final, own, both, self._counts())
            if found == "" and (tied := self._tied(chunk, number, final)):
                found = tied, None
            if isinstance(found, tuple):
                agree.add(found)
            else:
                if not found and final is not None and own is not None:
                    found = self._difference(chunk, number, final, own)
                wrong.setdefault(found, []).append(name)
        if wrong:
            return "; ".join(f"{_names(names)}: {what}" for what, names in wrong.items())
        summed = {both for _, both in agree if both is not None}
        notes = {how for how, _ in agree if how}
        return (summed.pop() if len(summed) == 1 else None), ", ".join(sorted(notes))

    def _counts(self) -> tuple[int, ...]:
        """What a program may divide gradients by: microbatches, replicas."""
        counts = {2, *self.microbatches.values(), sum(self.microbatches.values())}
        return tuple(sorted({count for one in counts for count in (one, 2 * one) if count > 1}))

    def _sums(self, chunk: Chunk, without: int | None = None) -> dict[int, Tensor | None]:
        """By parameter the sum of the plain gradients in microbatch order, in the dtype that the program keeps."""
        file = self.files[self.routes[chunk.lane][chunk.stage]]
        sums: dict[int, Tensor | None] = {}
        for mb in range(self.microbatches[chunk.lane]):
            found = self.forwards.get(Task(*chunk, mb))
            for number, gradient in (found or {}).get("weights", {}).items():
                final = file["final"][number]
                if gradient is None or mb == without:
                    sums.setdefault(number, file["before"].get(number))
                    continue
                added = gradient if final is None else gradient.to(final.dtype)
                sums[number] = _added(sums.get(number, file["before"].get(number)), added)
        return sums

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
        own = self._sums(chunk)[number]
        others = [Chunk(lane, stage) for lane, route in self.routes.items() for stage in range(len(route))]
        for other in (each for each in others if each != chunk):
            for at, total in self._sums(other).items():
                if own is not None and total is not None and total.shape == own.shape and _equal(final, own + total):
                    mine, theirs = self._name(chunk, number), self._name(other, at)
                    return f"{mine} is summed with {theirs} of stage {other.stage}, to which it is tied"
        return ""

    def _name(self, chunk: Chunk, number: int) -> str:
        return str(self.files[self.routes[chunk.lane][chunk.stage]]["names"][number])

    def _other(self, chunk: Chunk) -> dict[str, Tensor | None] | None:
        """The sums of the same stage on the other lane, by the names of parameters."""
        lane = next((lane for lane in self.routes if lane != chunk.lane), None)
        if lane is None:
            return None
        names = self.files[self.routes[lane][chunk.stage]].get("names", [])
        return {names[number]: total for number, total in self._sums(Chunk(lane, chunk.stage)).items()}

    def _difference(self, chunk: Chunk, number: int, final: Tensor, own: Tensor) -> str:
        """How a gradient differs from its plain sum."""
        count = self.microbatches[chunk.lane]
        for mb in range(count if count <= _MOST_TRIED else 0):
            if _equal(final, self._sums(chunk, without=mb)[number]):
                return f"the gradient lacks microbatch {mb}"
        if final.shape != own.shape:
            return f"the gradient has the shape {list(final.shape)} and not {list(own.shape)}"
        most = float((final.double() - own.double()).abs().max())
        return f"the gradient differs by up to {most:.3g}"


def _agreement(
    final: Tensor | None, own: Tensor | None, both: Tensor | None, counts: Sequence[int]
) -> tuple[str, bool | None] | str:
    """How a gradient agrees with its plain sum, and whether it is one over both lanes; or what differs."""
    if own is None:
        nothing = final is None or not bool(final.any())
        return ("", None) if nothing else "there is a gradient, and the plain run has none"
    if final is None:
        return "no gradient, and the plain run has one: is the store for weight gradients fed, and run?"
    for total, over_both in ((own, False), (both, True)):
        if total is None:
            continue
        if _equal(final, total):
            return ("summed over both lanes" if over_both else "", None if both is None else over_both)
        for count in counts:
            if _equal(final, total / count) or _equal(final, total * (1 / count)):
                lanes = "summed over both lanes and " if over_both else ""
                return f"{lanes}divided by {count}", None if both is None else over_both
    if not bool(final.any()):
        return "the gradient is zero, and the plain run has one: is the store for weight gradients fed, and run?"
    return ""


def _replicas(chunks: Sequence[ChunkComparison], files: Mapping[int, Mapping[str, Any]]) -> Iterator[str]:
    """The stages whose replicas were not summed before the optimizer changed the weights."""
    by_stage: dict[int, list[ChunkComparison]] = {}
    for each in chunks:
        by_stage.setdefault(each.chunk.stage, []).append(each)
    for stage, both in by_stage.items():
        updated = all(files[each.rank].get("by_optimizer") for each in both)
        if len(both) == len(Lane) and updated and any(each.summed is False for each in both):
            ranks = " and ".join(f"{each.rank}" for each in both)
            yield (
                f"the replicas of stage {stage} on ranks {ranks} were not summed before the optimizer's step: each "
                "would be updated by its own gradient"
            )


def _losses(
    files: Mapping[int, Mapping[str, Any]],
    logs: Sequence[RankLog],
    tasks: Mapping[ForwardId, Task],
    routes: Mapping[Lane, tuple[int, ...]],
) -> Iterator[LossComparison]:
    for lane, route in routes.items():
        last = [id for id, task in tasks.items() if task.chunk == Chunk(lane, len(route) - 1)]
        file = files[route[-1]]
        seen = set(file.get("seen", ()))
        computed = [id for id in last if logs[id.rank].forwards[logs[id.rank].find(id.number)].backward_began]
        count = sum(logs[id.rank].find(id.number) in seen for id in computed) if file.get("by_optimizer") else None
        collected = not {logs[id.rank].find(id.number) for id in computed}.isdisjoint(file.get("collected", ()))
        yield LossComparison(lane, route[-1], len(last), len(computed), count, collected)


def _added(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same shape and, bit by bit, the same values in the first one's dtype."""
    if one is None or other is None or one.shape != other.shape:
        return False
    other = other.to(one.dtype)
    return (
        torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
        if one.dim()
        else (torch.equal(one.reshape(1).view(torch.uint8), other.reshape(1).view(torch.uint8)))
    )


def _all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _among(taken: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> bool:
    """Whether every tensor is bitwise one of the others, whatever its shape."""
    flat = [tensor.reshape(-1) for tensor in given if tensor is not None]
    return all(any(_equal(tensor.reshape(-1), other) for other in flat) for tensor in taken if tensor is not None)


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _shown(found: Sequence[str]) -> tuple[str, ...]:
    """The first of several findings of one kind, and how many there are more."""
    more = len(found) - _MOST_NAMES
    return (*found[:_MOST_NAMES], *([f"and {more} more"] if more > 0 else []))
