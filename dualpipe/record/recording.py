"""A recording: the schedule that a program ran, and what a person should know about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualpipe.record.doubts import caveats_of, describe_doubts
from dualpipe.record.events import Event, Message, MessageId, RankLog, RecordError, read
from dualpipe.record.lineage import match, trace
from dualpipe.record.names import Lineage
from dualpipe.record.naming import Named, name_messages, uses
from dualpipe.record.reach import lengthen
from dualpipe.record.slots import notes_on_weights, programs
from dualpipe.record.steps import busy_steps, check_cut, of_step
from dualpipe.schedule import MESSAGES, Op, Schedule, ScheduleError, check_slot
from dualpipe.schedule.text import dumps


@dataclass(frozen=True)
class Recording:
    """What was recorded.

    Parameters
    ----------
    schedule:
        What every rank did, each message with its peer.
    steps:
        How many training steps the program ran; the schedule is of one of them.
    ended:
        For each rank whether its process came to its end.
    caveats:
        Why a proof of the schedule would be none of the whole program; empty where it would.
    notes:
        What was left out, guessed or reinterpreted, a sentence each.
    """

    schedule: Schedule
    steps: int
    ended: tuple[bool, ...]
    caveats: tuple[str, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """The schedule file, opened by the notes as comments."""
        return "".join(f"# {note}\n" for note in self.notes) + dumps(self.schedule)

    def summary(self) -> str:
        """One line: sizes and counts."""
        schedule = self.schedule
        ops = [placed.op for placed in schedule]
        messages = sum(op.kind in MESSAGES for op in ops)
        lanes = ", ".join(f"{count} microbatches of lane {lane}" for lane, count in schedule.microbatches.items())
        return (
            f"{schedule.ranks} ranks, {schedule.stages} stages, {lanes}: "
            f"{len(ops) - messages} computations and {messages} message ends in "
            f"{sum(map(len, schedule.programs))} slots"
        )

    def as_json(self) -> dict[str, Any]:
        """The recording as one JSON object."""
        return {
            "schedule": dumps(self.schedule),
            "ranks": self.schedule.ranks,
            "stages": self.schedule.stages,
            "microbatches": {str(lane): count for lane, count in self.schedule.microbatches.items()},
            "steps": self.steps,
            "ended": list(self.ended),
            "caveats": list(self.caveats),
            "notes": list(self.notes),
        }


def assemble(logs: Sequence[RankLog], name: str = "recorded", step: int = 1) -> Recording:
    """The recording that the logs of all ranks, in order of rank, amount to.

    Raises
    ------
    RecordError
        If something cannot be named, saying what and where in the program.
    """
    busy = busy_steps(logs)
    if not 1 <= step <= len(busy):
        raise RecordError("--step counts the training steps", f"there were {len(busy)}", f"it is {step}")
    everything = {m.id: m for log in logs for m in log.messages.values()}
    partner = match(list(everything.values()))
    check_cut(busy[step - 1], everything, partner, uses(logs))
    notes = [f"step {step} of {len(busy)}"] if len(busy) > 1 else []
    logs = of_step(logs, busy[step - 1])
    messages = {m.id: m for log in logs for m in log.messages.values()}
    tagged = sorted({m.at for m in messages.values() if m.tag})
    if tagged:
        notes.append(f"messages carry tags, as at {tagged[0]}; a schedule file has none, and so has NCCL")
    lineage = lengthen(trace(logs, messages, partner), logs, messages.values(), partner)
    named = name_messages(logs, messages, partner, lineage)
    check_cut(busy[step - 1], everything, partner, named.ops)
    notes += [*lineage.notes, *named.notes, *(note for log in logs for note in notes_on_weights(log, lineage))]
    notes += describe_doubts(logs, lineage)
    _check(lineage, named.ops, messages)
    ranks, early, repeated = programs(logs, named, messages, partner, lineage)
    notes += repeated
    if early:
        notes.append(
            f"{early} computations began with messages still in flight; the file puts a message where it was posted, "
            "and a blocking model waits for it there, which the program does not"
        )
    ended = tuple(log.ended for log in logs)
    schedule = Schedule(lineage.routes, ranks, name)
    lost = sum(id not in partner and id not in messages for id in everything)
    caveats = (*_caveats(ended, named, lost), *caveats_of(logs, lineage))
    return Recording(schedule, len(busy), ended, caveats, tuple(notes))


def _caveats(ended: Sequence[bool], named: Named, lost: int) -> Iterator[str]:
    cut = [str(rank) for rank, well in enumerate(ended) if not well]
    if cut:
        yield f"rank{'s' * (len(cut) > 1)} {' '.join(cut)} did not come to the end"
    if named.unknown:
        yield f"{named.unknown} sends hold what no forward and no backward was seen to make"
    if named.unused:
        yield f"{len(named.unused)} receives bring what no forward and no backward was seen to take"
    if named.control:
        yield f"{named.control} message ends are left out as control data"
    if lost:
        yield f"{lost} messages of other training steps never met a partner"


def _check(lineage: Lineage, ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message]) -> None:
    """Raise ``RecordError`` where what was concluded is no schedule, with the place in the program."""
    lengths = {len(route) for route in lineage.routes.values()}
    if len(lengths) > 1:
        raise RecordError(
            "both lanes run the same model",
            " and ".join(
                f"lane {lane} goes over the ranks {' '.join(map(str, route))}" for lane, route in lineage.routes.items()
            ),
            "if the program came to its end, record one pipeline alone",
        )
    for id, op in ops.items():
        try:
            check_slot((op,), lineage.routes)
        except ScheduleError as error:
            raise RecordError(
                error.rule, f"{error.got}: the message of rank {id.rank} at {messages[id].at}", "look there"
            ) from error


def assemble_events(events: Mapping[int, Sequence[Event]], name: str = "recorded", step: int = 1) -> Recording:
    """As ``assemble``, from the events that each rank kept in memory."""
    return assemble([read(rank, events[rank]) for rank in sorted(events)], name, step)
