"""A recording: the schedule that a program ran, with notes and caveats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualpipe.record.events import Doubt, Event, Message, MessageId, RankLog, RecordError, read
from dualpipe.record.lineage import Lineage, match, reordered, trace
from dualpipe.record.naming import name_messages, uses
from dualpipe.record.notes import caveats, notes_on_doubts, notes_on_weights
from dualpipe.record.observed import observe
from dualpipe.record.routes import complete
from dualpipe.record.slots import programs
from dualpipe.record.steps import check_within_step, computing_steps, select_step
from dualpipe.schedule import MESSAGES, Op, Schedule, ScheduleError, check_slot
from dualpipe.schedule.text import dumps


@dataclass(frozen=True)
class Recording:
    """What was recorded.

    Parameters
    ----------
    schedule:
        The ops of every rank, each message with its peer.
    steps:
        How many training steps the program ran; the schedule is one of them.
    ended:
        For each rank whether it finished.
    caveats:
        Why a proof of the schedule does not cover the whole program; empty if it does.
    notes:
        What was left out, guessed or reinterpreted, one sentence each.
    """

    schedule: Schedule
    steps: int
    ended: tuple[bool, ...]
    caveats: tuple[str, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """The schedule file, with the notes as comments at the top."""
        return "".join(f"# {note}\n" for note in self.notes) + dumps(self.schedule)

    def summary(self) -> str:
        """Sizes and counts in one line."""
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
    """The recording of the logs of all ranks, in order of rank.

    Raises
    ------
    RecordError
        If an op cannot be named; the error gives the line of the program.
    """
    steps = computing_steps(logs)
    if not 1 <= step <= len(steps):
        got = f"got {step}, and there were {len(steps)}"
        raise RecordError("--step counts the training steps", got, "use one of them")
    everything = {m.id: m for log in logs for m in log.messages.values()}
    partner = match(list(everything.values()))
    check_within_step(steps[step - 1], everything, partner, uses(logs))
    notes = [f"step {step} of {len(steps)}"] if len(steps) > 1 else []
    logs = select_step(logs, steps[step - 1])
    messages = {m.id: m for log in logs for m in log.messages.values()}
    tagged = sorted({m.at for m in messages.values() if m.tag})
    if tagged:
        notes.append(f"messages carry tags, as at {tagged[0]}; a schedule file and NCCL have none")
    lineage = complete(trace(logs, messages, partner), logs, messages.values(), partner)
    named = name_messages(logs, messages, partner, lineage)
    check_within_step(steps[step - 1], everything, partner, named.ops)
    for message in reordered(messages, partner, named.ops):
        logs[message.id.rank].doubts.append(Doubt("several groups", -1, message.at, message.step))
    notes += [*lineage.notes, *named.notes, *(note for log in logs for note in notes_on_weights(log, lineage))]
    notes += notes_on_doubts(logs, lineage)
    _check(lineage, named.ops, messages)
    made = programs(logs, named, messages, partner, lineage)
    notes += made.notes
    if made.early:
        notes.append(
            f"{made.early} computations began with messages still in flight; in the file a message is where it was "
            "posted, and the blocking model waits for it there, though the program does not"
        )
    ended = tuple(log.ended for log in logs)
    lost = sum(id not in partner and id not in messages for id in everything)
    observed = observe(logs, made.placed, lineage, named.guesses)
    schedule = Schedule(lineage.routes, made.of_rank, name, observed=observed)
    return Recording(schedule, len(steps), ended, tuple(caveats(logs, lineage, named, lost)), tuple(notes))


def _check(lineage: Lineage, ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message]) -> None:
    """Raise ``RecordError``, with the line of the program, if the result is not a schedule."""
    lengths = {len(route) for route in lineage.routes.values()}
    if len(lengths) > 1:
        raise RecordError(
            "both lanes run the same model",
            " and ".join(
                f"lane {lane} has the ranks {' '.join(map(str, route))}" for lane, route in lineage.routes.items()
            ),
            "if the program finished, record one pipeline alone",
        )
    for id, op in ops.items():
        try:
            check_slot((op,), lineage.routes)
        except ScheduleError as error:
            raise RecordError(
                error.rule, f"{error.got}: the message of rank {id.rank} at {messages[id].at}", "correct that message"
            ) from error


def assemble_events(events: Mapping[int, Sequence[Event]], name: str = "recorded", step: int = 1) -> Recording:
    """Like ``assemble``, from the events that each rank kept in memory."""
    return assemble([read(rank, events[rank]) for rank in sorted(events)], name, step)
