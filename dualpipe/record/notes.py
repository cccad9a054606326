"""What a schedule cannot express of a program: notes for the reader, and caveats for a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dualpipe.record.events import Doubt, ForwardId, Owed, RankLog
from dualpipe.record.gradients import lacking, uncertain
from dualpipe.record.lineage import Lineage
from dualpipe.record.naming import Named
from dualpipe.record.phrases import DOUBTS, counted
from dualpipe.schedule import F, Op

_MOST_NAMES = 3


def notes_on_doubts(logs: Sequence[RankLog], lineage: Lineage) -> list[str]:
    """One note for each rank, kind of doubt and line of the program."""
    places: dict[tuple[int, str, str], list[Doubt]] = {}
    for rank, doubt in _doubts(logs, lineage):
        places.setdefault((rank, doubt.what, doubt.at), []).append(doubt)
    notes = []
    for (rank, what, at), doubts in places.items():
        task = lineage.tasks.get(ForwardId(rank, doubts[0].forward))
        op = "" if task is None else Op(F, *task)
        times = f" ({len(doubts)} times)" if len(doubts) > 1 else ""
        notes.append(f"rank {rank}: {DOUBTS[what][0].format(at=at, op=op)}{times}")
    return notes


def notes_on_weights(log: RankLog, lineage: Lineage) -> list[str]:
    """Where the W of a rank's forwards is something else than a change of a parameter's ``.grad``, or is missing."""
    notes: Counter[str] = Counter()
    without, unsure = lacking(log), uncertain(log)
    for number, forward in log.forwards.items():
        task = lineage.tasks.get(ForwardId(log.rank, log.find(number)))
        if task is None:
            continue
        if log.ended and (owed := without.get(number)):
            later = f"; it is computed in a later training step, at {forward.paid_at}" if forward.paid_at else ""
            notes[
                f"the backward at {owed[0].at} gives {_names(owed)} of stage {task.stage} no gradient, and nothing "
                f"adds one later in the step: it has no W{later}"
            ] += 1
        elif log.ended and (owed := unsure.get(number)):
            what = "nothing but zeros" if owed[0].how == "all zero" else "no gradient, though the forward reads it"
            notes[
                f"the backward at {owed[0].at} gives {_names(owed)} of stage {task.stage} {what}; whether the program "
                "computes that gradient at all could not be determined"
            ] += 1
        elif forward.weights or forward.sharded:
            continue
        elif forward.requested_at:
            notes[f"weight gradients computed at {forward.requested_at} reach no .grad; their W is there"] += 1
        elif forward.backward_began and forward.untrainable:
            notes[f"no module of stage {task.stage} has a parameter to train; its W is written with its B"] += 1
        elif forward.backward_began and log.ended:
            notes[f"a backward from the forward at {forward.at} changed no .grad: it has no W"] += 1
    return [f"rank {log.rank}: {note} ({times} times)" for note, times in sorted(notes.items())]


def _names(owed: Sequence[Owed]) -> str:
    more = len(owed) - _MOST_NAMES
    return ", ".join(each.name for each in owed[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def caveats(logs: Sequence[RankLog], lineage: Lineage, named: Named, lost: int) -> Iterator[str]:
    """Why a proof of the schedule does not cover the whole program.

    ``lost`` counts the unmatched messages of training steps that are not in the schedule.
    """
    cut = [str(log.rank) for log in logs if not log.ended]
    if cut:
        yield f"rank{'s' * (len(cut) > 1)} {' '.join(cut)} did not finish"
    if named.unknown:
        made = "that no observed forward or backward made"
        yield counted(named.unknown, f"send has a tensor {made}", f"sends have tensors {made}")
    if named.weights:
        of = "the gradient of a parameter, where a stage takes that of its output"
        yield counted(named.weights, f"send has {of}", f"sends have {of}")
    if named.unused:
        used = "that no observed forward or backward uses"
        yield counted(len(named.unused), f"receive has a tensor {used}", f"receives have tensors {used}")
    if named.control:
        data = "left out as control data"
        yield counted(named.control, f"message end is {data}", f"message ends are {data}")
    if lost:
        steps = "other training steps"
        yield counted(lost, f"message of {steps} was never matched", f"messages of {steps} were never matched")
    unsure = sum(ForwardId(log.rank, n) in lineage.tasks for log in logs if log.ended for n in uncertain(log))
    if unsure:
        get = counted(unsure, "backward gets all its", "backwards get all their")
        yield f"whether {get} weight gradients could not be determined"
    counts = Counter(doubt.what for _, doubt in _doubts(logs, lineage))
    for what, count in counts.items():
        yield counted(count, *DOUBTS[what][1])


def _doubts(logs: Sequence[RankLog], lineage: Lineage) -> Iterator[tuple[int, Doubt]]:
    """The doubts about messages and about forwards of the pipeline, with their ranks."""
    for log in logs:
        for doubt in log.doubts:
            if doubt.what == "several groups" or ForwardId(log.rank, log.find(doubt.forward)) in lineage.tasks:
                yield log.rank, doubt
