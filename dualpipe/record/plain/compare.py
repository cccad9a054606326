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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dualpipe.record.comparison import ChunkComparison, Clipping, Comparison, LossWeights
from dualpipe.record.events import ForwardId, RankLog
from dualpipe.record.plain.clipping import beyond_limits, judge
from dualpipe.record.plain.data import are_those_of_the_other_lane, note
from dualpipe.record.plain.factors import Lasts, factors, uneven, weights_of
from dualpipe.record.plain.links import Plainly
from dualpipe.record.plain.losses import losses_of
from dualpipe.record.plain.proportions import alike
from dualpipe.record.plain.replicas import differences, updates
from dualpipe.record.plain.shared import perhaps_tied
from dualpipe.record.plain.step import Step
from dualpipe.record.recording import Recording
from dualpipe.schedule import Chunk, Lane, Op, Task


def add_comparison(
    recording: Recording,
    folder: Path,
    logs: Sequence[RankLog],
    clip_norm: float | None = None,
    pipelines: Sequence[Recording] = (),
    reduction: str | None = None,
) -> Recording:
    """The recording with its comparison; ``logs`` are those of all ranks of the job, ``pipelines`` all recordings.

    ``clip_norm`` and ``reduction`` are as for ``compare``.
    """
    schedule = recording.schedule
    places = {placed.op.bare: at for placed in schedule if (at := schedule.observed.place(placed))}
    ranks = recording.pipeline_ranks
    others = [(each.tasks, each.schedule.routes, each.pipeline_ranks) for each in pipelines if each is not recording]
    of_job = ranks or range(schedule.ranks)
    sent = [(op.bare, logs[of_job[id.rank]].messages[id.number]) for id, op in recording.messages.items()]
    foreign = {
        op: bool(message.weights)
        for op, message in sent
        if message.send and not message.activation_of and not message.gradient_of
    }
    compared = compare(
        folder, logs, recording.tasks, schedule.routes, ranks, clip_norm, places, others, foreign, reduction
    )
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
    reduction: str | None = None,
) -> Comparison:
    """Compare the step of the ``logs`` with the plain runs in the files ``RANK.pt`` of a folder.

    ``ranks`` are the ranks of the job that the recorded pipeline has, in the order of its own; none if it has all.
    ``clip_norm`` is the norm to which the program clips all gradients together, if the user says; ``places`` are the
    lines of the program of its ops.  ``pipelines`` are the tasks, routes and ranks of the other pipelines of the job.
    ``foreign`` are the sends of tensors that no forward or backward of a stage made, and whether they are certainly
    something else, as the gradient of a parameter is.  ``reduction`` is ``mean`` or ``sum`` if the user says that the
    gradient is that of the losses of all microbatches.
    """
    others = len(logs) > len({rank for route in routes.values() for rank in route})
    if len({*ranks}.union(*(each[2] for each in pipelines))) < len(logs):
        pipelines = ()  # some ranks are in no recording
    replicas_of = [_step(folder, logs, *each) for each in pipelines]
    of_others = [
        Lasts.of(each.files, [logs[rank] for rank in own], of, routes_of)
        for each, (of, routes_of, own) in zip(replicas_of, pipelines, strict=True)
    ]
    step = replace(_step(folder, logs, tasks, routes, ranks, others, places or {}, replicas_of), foreign=foreign or {})
    files, forwards = step.files, step.forwards
    logs = [logs[rank] for rank in ranks or range(len(logs))]
    chunks = tuple(step.chunk(chunk) for chunk, _ in _holders(routes))
    chunks = tuple(
        replace(each, summed=step.is_summed(each.chunk)) if each.summed is None and each.faults else each
        for each in chunks
    )
    chunks = tuple(_with_note(each, "" if each.chunk.stage else note(forwards, each.chunk.lane)) for each in chunks)
    tied = [*perhaps_tied(step, chunks)]
    chunks = tuple(
        replace(each, notes=(*each.notes, *(note for chunk, note in tied if chunk == each.chunk))) for each in chunks
    )
    weigh = partial(weights_of, Lasts.of(files, logs, tasks, routes), of_others, chunks, not others, reduction)
    same = are_those_of_the_other_lane(forwards)
    clipping = (
        Clipping(unknown=(SAME_DATA,)) if same else _clipping(chunks, files, forwards, clip_norm, others, weigh())
    )
    clipping = replace(clipping, unknown=(*clipping.unknown, *beyond_limits(step, chunks)))
    weights = weigh(clipping.scale)
    losses = tuple(losses_of(files, logs, tasks, routes, chunks, weights))
    sums = [replace(each, summed=None) for each in chunks] if same else chunks
    replicas = tuple(differences(sums, files, forwards, lambda each: next(iter(step.reductions(each.chunk)), "")))
    found = Comparison(chunks, losses, replicas, clipping, weights, updates=tuple(updates(sums, files, forwards)))
    scaled = any(each.scale != 1 or each.divided_by != 1 for each in chunks)
    steps = {logs[id.rank].forwards[logs[id.rank].find(id.number)].step for id in tasks if id.rank < len(logs)}
    return replace(found, changes=tuple(_changes(logs, steps))) if scaled or found.verdict != "equal" else found


def _with_note(each: ChunkComparison, text: str) -> ChunkComparison:
    return replace(each, notes=(*each.notes, text)) if text else each


def _clipping(
    chunks: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Plainly],
    limit: float | None,
    others: bool,
    weights: LossWeights,
) -> Clipping:
    """What is wrong with the scales of the gradients: with their clipping, or because they are uneven.

    A scale that makes the gradient the mean or the sum over the losses undoes a loss scale, and clips nothing.
    """
    found = factors(chunks)
    known = limit is None and weights.reduction in ("mean", "sum")
    if known or (found and all(alike([1.0, factor]) for factor in found.values())):
        chunks = [replace(each, scale=1.0) for each in chunks]
    clipping = judge(chunks, files, forwards, limit, others)
    if clipping.faults or not (text := uneven(found)):
        return clipping
    return replace(clipping, faults=(text,), unknown=())


def _holders(routes: Mapping[Lane, tuple[int, ...]]) -> list[tuple[Chunk, int]]:
    """Every stage of every lane, with its rank."""
    return [(Chunk(lane, stage), rank) for lane, route in routes.items() for stage, rank in enumerate(route)]


def _reductions(
    logs: Mapping[Chunk, RankLog], tasks: Mapping[ForwardId, Task], chunk: Chunk
) -> dict[str, frozenset[str]]:
    """The collectives of a rank on gradients of a chunk's parameters, each with its line, and the names of these."""
    log = logs[chunk]
    called = {log.forwards[log.find(id.number)].module for id, task in tasks.items() if task.chunk == chunk}
    modules = called.union(*(log.modules[module][1] for module in called))
    found: dict[str, frozenset[str]] = {}
    for each in log.collectives.values():
        if not modules.isdisjoint(each.modules):
            what = f"{each.name} at {each.at}"
            found[what] = found.get(what, frozenset()).union(each.names)
    return found


def _step(
    folder: Path,
    logs: Sequence[RankLog],
    tasks: Mapping[ForwardId, Task],
    routes: Mapping[Lane, tuple[int, ...]],
    ranks: Sequence[int],
    others: bool = True,
    places: Mapping[Op, str] | None = None,
    replicas: Sequence[Step] = (),
) -> Step:
    """The files of the ranks of one pipeline, and what they have for each of its forwards."""
    ranks = ranks or range(len(logs))
    logs = [logs[rank] for rank in ranks]
    files = {rank: _load(folder / f"{ranks[rank]}.pt") for route in routes.values() for rank in route}
    if any(files[rank].get("discarded", 0) > len(logs[rank].discarded) for rank in files):
        files = {rank: {"error": _TWICE} for rank in files}
    forwards: dict[Task, Plainly] = {}
    for id, task in sorted(tasks.items()):
        file, log = files.get(id.rank, {}), logs[id.rank]
        parts = {n: each for n, each in file.get("forwards", {}).items() if log.find(n) == log.find(id.number)}
        if parts:  # several if the program computes a forward again, by hand: the one that its backward ran from counts
            number = max(parts, key=lambda n: bool(parts[n].get("ran")))
            forwards[task] = parts[number] | {"layers": file.get("layers", {}).get(number, {})}
        elif "error" not in file:
            forwards[task] = {"error": _NOT_KEPT}
    counts = {lane: 1 + max((t.mb for t in tasks.values() if t.lane == lane), default=-1) for lane in routes}
    of_chunk = {chunk: logs[rank] for chunk, rank in _holders(routes)}
    reductions = partial(_reductions, of_chunk, tasks)
    return Step(files, forwards, routes, counts, others, places or {}, tuple(replicas), reductions=reductions)


SAME_DATA = (
    "each microbatch of lane < begins with the same data as that of lane >, so twice the gradient of one lane looks "
    "the same as the sum over both: does each lane get its own half of the data?"
)
_NOT_KEPT = (
    "its module takes or returns no tensor, as one that puts its output into a queue: let it return what it computes, "
    "or name it with --container"
)
_TWICE = (
    "some ranks threw away their gradients during the step and computed again, and others did not: run the program "
    "without that, or give every rank an optimizer"
)


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
        content |= {"changed": later["weights"]} | {name: later[name] for name in ("clipped", "read", "later")}
    return content
