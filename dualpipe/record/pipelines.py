"""Finds the pipelines of a job: ranks that exchange activations or gradients are in the same pipeline.

Each data-parallel replica, and each rank of a tensor-parallel group, belongs to another pipeline.  The two lanes of a
bidirectional pipeline share its ranks, so they are one pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from dualpipe.record.collectives import clashes
from dualpipe.record.events import Event, Message, RankLog, RecordError, read
from dualpipe.record.failures import Codes, fails
from dualpipe.record.lanes import Lanes
from dualpipe.record.lineage import match
from dualpipe.record.lockstep import apart, shared
from dualpipe.record.naming import uses
from dualpipe.record.phrases import counted
from dualpipe.record.recording import Recording, assemble
from dualpipe.record.steps import choose_step, select_step
from dualpipe.schedule import Failure, Schedule, printable

Ranks = tuple[int, ...]


def parse(text: str) -> Ranks:
    """The ranks of ``--pipeline-ranks``, such as ``0 2``.  Raises ``RecordError`` for anything else."""
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words) or len(set(words)) < len(words):
        raise RecordError(
            "--pipeline-ranks are different ranks of one pipeline", f"got {text!r}", "write for instance '0 2'"
        )
    return tuple(map(int, words))


def assemble_all(
    logs: Sequence[RankLog],
    name: str = "recorded",
    step: int | None = None,
    lanes: Lanes | None = None,
    codes: Codes = (),
    ranks: Ranks | None = None,
) -> list[Recording]:
    """The recording of every pipeline of a job, or only of the pipeline with these ``ranks`` (see ``assemble``).

    The ranks of a pipeline are numbered from 0 in its recording, in the order of ``ranks`` or of the job.  With
    ``lanes`` all ranks are one pipeline unless ``ranks`` chooses some.

    Raises
    ------
    RecordError
        If ``assemble`` raises it, or for ``ranks`` that the job does not have.
    """
    if ranks is not None and max(ranks) >= len(logs):
        got = f"got {max(ranks)}, and the job has the ranks 0 to {len(logs) - 1}"
        raise RecordError("--pipeline-ranks are ranks of the job", got, "correct them")
    found = [ranks] if ranks is not None else pipelines(logs) if lanes is None else []
    if len(found) < 2 and ranks is None:
        return [assemble(logs, name, step, lanes, codes)]
    recordings = [_assemble(logs, own, name, step, lanes, codes) for own in found]
    failed = any(fails(log, codes) for log in logs)
    if not failed:
        every = found if ranks is None else pipelines(logs)
        recordings = [_with_others(each, logs, every, step) for each in recordings]
    if len(recordings) > 1:
        clash = clashes(logs, found)
        recordings = [_with_clashes(recording, clash) for recording in recordings]
    outside = {log.rank for log in logs if fails(log, codes)} - {rank for own in found for rank in own}
    if ranks is not None or not outside:
        return recordings
    caveat = f"ranks {' '.join(map(str, sorted(outside)))} of the job failed before they were part of a pipeline"
    return [replace(recording, caveats=(*recording.caveats, caveat)) for recording in recordings]


def _with_others(recording: Recording, logs: Sequence[RankLog], every: Sequence[Ranks], step: int | None) -> Recording:
    """The recording with what a proof of it says about the collectives that it shares with other pipelines."""
    own = tuple(sorted(recording.pipeline_ranks))
    steps, chosen = choose_step(select(logs, own), step, failed=False)
    number = steps[chosen - 1]
    if not any(shared(logs[rank], own, number) for rank in own):
        return recording
    reason = apart(select_step(logs, number), every if own in every else [own], own, number)
    if reason:
        caveat = f"the order of the collectives that it shares with other pipelines is not proved: {reason}"
        return replace(recording, caveats=(*recording.caveats, caveat))
    note = (
        "the pipelines that share collectives with this one post and wait for the same messages and collectives in the "
        "same order, so a proof covers these collectives"
    )
    return replace(recording, notes=(*recording.notes, note))


def _with_clashes(recording: Recording, clash: Mapping[int, str]) -> Recording:
    """The recording with the collectives on which its ranks and those of other pipelines disagree, as failures."""
    own = [
        Failure(number, printable(clash[rank])) for number, rank in enumerate(recording.pipeline_ranks) if rank in clash
    ]
    old = recording.schedule
    failures = [*own, *old.failures]
    schedule = Schedule(old.routes, old.programs, old.name, old.groups, failures=failures, observed=old.observed)
    return replace(recording, schedule=schedule) if own else recording


def assemble_one(
    logs: Sequence[RankLog],
    step: int | None = None,
    lanes: Lanes | None = None,
    ranks: Sequence[int] | None = None,
    name: str = "recorded",
) -> Recording:
    """The recording of the only pipeline, or of the one with these ranks.  Raises ``RecordError`` for several."""
    found = assemble_all(logs, name, step, lanes, ranks=None if ranks is None else tuple(ranks))
    if len(found) > 1:
        shown = " and ".join(" ".join(map(str, recording.pipeline_ranks)) for recording in found)
        raise RecordError(
            "a recording covers one pipeline", f"got those of ranks {shown}", "choose with pipeline_ranks"
        )
    return found[0]


def beside(recording: Recording, logs: Sequence[RankLog], step: int | None = None) -> list[Recording]:
    """The recordings of the other pipelines of a job; none if one of them cannot be recorded."""
    try:
        every = assemble_all(logs, step=step) if recording.pipeline_ranks else []
    except RecordError:
        return []
    return [each for each in every if {*each.pipeline_ranks}.isdisjoint(recording.pipeline_ranks)]


def _assemble(
    logs: Sequence[RankLog], ranks: Ranks, name: str, step: int | None, lanes: Lanes | None, codes: Codes
) -> Recording:
    recording = assemble(select(logs, ranks), name, step, lanes, [codes[rank] for rank in ranks] if codes else ())
    notes = [
        f"ranks 0 to {len(ranks) - 1} of this file are the ranks {' '.join(map(str, ranks))} of the job, in this order"
    ]
    left = [message for rank in ranks for message in logs[rank].messages.values() if message.peer not in ranks]
    matched = match([message for log in logs for message in log.messages.values()])
    lost = [message for message in left if message.id not in matched]
    if left:
        others = "with ranks of other pipelines"
        count = counted(len(left), f"message {others} is", f"messages {others} are")
        notes.append(f"{count} left out, as at {left[0].at}")
    caveats = [_caveat(message) for message in lost]
    return replace(
        recording, notes=(*notes, *recording.notes), caveats=(*recording.caveats, *caveats), pipeline_ranks=ranks
    )


def _caveat(message: Message) -> str:
    what = "send to" if message.send else "receive from"
    return (
        f"rank {message.id.rank} of the job has a {what} rank {message.peer}, of another pipeline, at {message.at} "
        "that was never matched"
    )


def pipelines(logs: Sequence[RankLog]) -> list[Ranks]:
    """The ranks of every pipeline, if there are several; each has two ranks or more.

    Two ranks are in one pipeline if one sends an activation or a gradient that the other uses, or would have used but
    for a failure, or if they exchange tensors in a process group that does not have all ranks.  If no ranks do either,
    the log does not show several pipelines.  A rank that does neither, as after an early hang, is in the pipeline of
    the ranks with which it exchanges any other messages.  A rank that did not end is in the pipeline of the ranks whose
    messages it was waiting for.
    """
    messages = {m.id: m for log in logs for m in log.messages.values()}
    partner, used = match(list(messages.values())), uses(logs)
    with_rank = {log.rank: {log.rank} for log in logs}

    def join(*ranks: int) -> None:
        whole = set().union(*(with_rank[rank] for rank in ranks if rank in with_rank))
        with_rank.update(dict.fromkeys(whole, whole))

    for id, message in messages.items():
        carries = message.send and (message.activation_of or message.gradient_of)
        if carries and (partner.get(id) in used or not logs[message.peer].ended):
            join(id.rank, message.peer)
    for members in _small_groups(logs):
        join(*members)
    alone = {rank for rank, together in with_rank.items() if len(together) == 1}
    if len(alone) == len(logs):
        return []
    for id, message in messages.items():
        waited = id not in partner and not logs[id.rank].ended
        if waited or not alone.isdisjoint((id.rank, message.peer)):
            join(id.rank, message.peer)
    found = sorted({tuple(sorted(ranks)) for ranks in with_rank.values() if len(ranks) > 1})
    return found if len(found) > 1 else []


def _small_groups(logs: Sequence[RankLog]) -> Iterator[Sequence[int]]:
    """The process groups in which activations or gradients may be exchanged, except those that have all ranks."""
    for log in logs:
        for event in log.events:
            if event["event"] == "post":
                yield from (m["group"] for m in event["messages"] if m["real"] and 1 < len(m["group"]) < len(logs))


def select(logs: Sequence[RankLog], ranks: Ranks) -> list[RankLog]:
    """The logs of some ranks, numbered from 0, without their messages with other ranks."""
    number = {rank: count for count, rank in enumerate(ranks)}
    return [read(count, [*_renumbered(logs[rank], number)]) for rank, count in number.items()]


def _renumbered(log: RankLog, number: Mapping[int, int]) -> Iterator[Event]:
    gone = {id for id, message in log.messages.items() if message.peer not in number}

    def kept(messages: Sequence[int]) -> list[int]:
        return [message for message in messages if message not in gone]

    for event in log.events:
        match event["event"]:
            case "post":
                posted = [m | {"peer": number[m["peer"]]} for m in event["messages"] if m["message"] not in gone]
                yield {**event, "messages": posted}
            case "wait" | "poll" | "completed" | "forward":
                yield {**event, "messages": kept(event["messages"])}
            case "gradients":
                yield {**event, "messages": [kept(messages) for messages in event["messages"]]}
            case "collective":
                yield {**event, "group": [number.get(member, -1) for member in event["group"]]}
            case "access" | "keep" if event["message"] in gone or event.get("posted") in gone:
                pass
            case _:
                yield event
