"""A recording: the schedule that a program ran, with notes and caveats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dualpipe.record.arrivals import note_arrivals
from dualpipe.record.collectives import name_collectives
from dualpipe.record.comparison import Comparison
from dualpipe.record.events import Doubt, Event, ForwardId, Message, MessageId, RankLog, RecordError, read_all
from dualpipe.record.failures import Codes, fails
from dualpipe.record.failures import failures as conclude_failures
from dualpipe.record.lanes import Lanes, check_ranks, guess
from dualpipe.record.lineage import Lineage, match, reordered, trace
from dualpipe.record.naming import name_messages, uses
from dualpipe.record.notes import caveats, notes_on_doubts, notes_on_weights
from dualpipe.record.observed import observe
from dualpipe.record.phrases import counted
from dualpipe.record.routes import complete, is_whole
from dualpipe.record.slots import programs
from dualpipe.record.steps import check_within_step, choose_step, select_step
from dualpipe.schedule import MESSAGES, Lane, Op, Program, Schedule, ScheduleError, Task, check_slot
from dualpipe.schedule.observed_text import lines_of
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
    pipeline_ranks:
        If the job has several pipelines, the ranks of the job that this one has, in the order of the schedule's ranks.
    tasks:
        The stage, lane and microbatch of every forward.
    messages:
        The op of every message end.
    comparison:
        How the step compares with a plain run of the same modules, if that was asked for.
    """

    schedule: Schedule
    steps: int
    ended: tuple[bool, ...]
    caveats: tuple[str, ...]
    notes: tuple[str, ...]
    pipeline_ranks: tuple[int, ...] = ()
    tasks: Mapping[ForwardId, Task] = field(default_factory=dict, repr=False, compare=False)
    messages: Mapping[MessageId, Op] = field(default_factory=dict, repr=False, compare=False)
    comparison: Comparison | None = None

    def text(self) -> str:
        """The schedule file, with the notes and the caveats as comments at the top and what was observed at the end."""
        caveats = [f"a proof of this file does not cover everything: {caveat}" for caveat in self.caveats]
        return "".join(f"# {line}\n" for line in (*self.notes, *caveats)) + dumps(self.schedule, observed=True)

    def summary(self) -> str:
        """Sizes and counts in one line."""
        schedule = self.schedule
        ops = [placed.op for placed in schedule]
        messages = sum(op.kind in MESSAGES for op in ops)
        counts = schedule.microbatches.items()
        lanes = ", ".join(f"{counted(count, 'microbatch', 'microbatches')} of lane {lane}" for lane, count in counts)
        return (
            f"{schedule.ranks} ranks, {schedule.stages} stages, {lanes}: "
            f"{len(ops) - messages} computations and {messages} message ends in "
            f"{sum(map(len, schedule.programs))} slots"
        )

    def as_json(self) -> dict[str, Any]:
        """The recording as one JSON object."""
        compared = {} if self.comparison is None else {"comparison": self.comparison.as_json()}
        failed = [failure._asdict() for failure in self.schedule.failures]
        failures = {"failures": failed} if failed else {}
        return {
            "schedule": dumps(self.schedule),
            "ranks": self.schedule.ranks,
            "stages": self.schedule.stages,
            "microbatches": {str(lane): count for lane, count in self.schedule.microbatches.items()},
            "steps": self.steps,
            "ended": list(self.ended),
            "caveats": list(self.caveats),
            "notes": list(self.notes),
            "observed": lines_of(self.schedule.observed, self.schedule.programs),
            **({"pipeline_ranks": list(self.pipeline_ranks)} if self.pipeline_ranks else {}),
            **failures,
            **compared,
        }


def assemble(
    logs: Sequence[RankLog],
    name: str = "recorded",
    step: int | None = None,
    lanes: Lanes | None = None,
    codes: Codes = (),
) -> Recording:
    """The recording of the logs of all ranks, in order of rank.

    Parameters
    ----------
    step:
        The training step, from 1; by default the first whose gradients an optimizer uses.
    lanes:
        The ranks and modules of each lane, for a run whose messages do not show them.
    codes:
        The exit code of each rank, ``None`` for a rank that was stopped while it ran; empty if they are not known.

    Raises
    ------
    RecordError
        If an op cannot be named; the error gives the line of the program.  There is always a recording of a program
        that failed: what cannot be named is left out, with a caveat.
    """
    if lanes is not None:
        check_ranks(lanes, len(logs))
    failed = any(fails(log, codes) for log in logs)
    steps, chosen = choose_step(logs, step, failed)
    run = _Run(logs, name, steps, chosen, lanes, codes)
    try:
        return run.recording()
    except RecordError as error:
        if not failed:
            raise
        return run.without_ops(error)


@dataclass(frozen=True)
class _Run:
    """The logs of a program and what is known about it; ``step`` counts from 1 in ``steps``."""

    logs: Sequence[RankLog]
    name: str
    steps: Sequence[int]
    step: int
    lanes: Lanes | None
    codes: Codes

    def recording(self) -> Recording:
        """The recording.  Raises ``RecordError`` if an op cannot be named."""
        number, steps = self.steps[self.step - 1], len(self.steps)
        everything = {m.id: m for log in self.logs for m in log.messages.values()}
        partner = match(list(everything.values()))
        check_within_step(number, everything, partner, uses(self.logs))
        notes = [f"step {self.step} of {steps}"] if steps > 1 else []
        notes += _notes_on_discarded(self.logs, self.steps)
        logs = select_step(self.logs, number)
        messages = {m.id: m for log in logs for m in log.messages.values()}
        tagged = sorted({m.at for m in messages.values() if m.tag})
        if tagged:
            notes.append(f"messages carry tags, as at {tagged[0]}; a schedule file and NCCL have none")
        lineage, doubts = self.lineage(logs, messages, partner)
        lost = [m for m in messages.values() if self.failed(logs) and not _has_boundary(m, partner, lineage)]
        named_messages = {id: m for id, m in messages.items() if m not in lost}
        named = name_messages(logs, named_messages, partner, lineage)
        check_within_step(number, everything, partner, named.ops)
        note_arrivals(logs, self.logs)
        for message in reordered(messages, partner, named.ops):
            logs[message.id.rank].doubts.append(Doubt("several groups", -1, message.at, message.step))
        notes += [*lineage.notes, *named.notes, *(note for log in logs for note in notes_on_weights(log, lineage))]
        notes += [*notes_on_doubts(logs, lineage), *map(_note_on_lost, lost)]
        _check(lineage, named.ops, messages)
        collectives = name_collectives(self.logs, lineage, number)
        made = programs(logs, named, messages, partner, lineage, collectives)
        notes += [*made.notes, *collectives.notes]
        if made.early:
            notes.append(
                f"{counted(made.early, 'computation', 'computations')} began with messages still in flight; in the "
                "file a message is where it was posted, and the blocking model waits for it there, though the program "
                "does not"
            )
        failures, ranks = conclude_failures(
            self.logs, self.codes, named.ops, everything, lineage, made.of_rank, number, named.guesses
        )
        elsewhere = sum(id not in partner and id not in messages for id in everything)
        doubts += caveats(logs, lineage, named, elsewhere)
        if lost:
            between = "between ranks without neighbouring stages"
            one, several = f"unmatched message {between} is", f"unmatched messages {between} are"
            doubts.append(f"{counted(len(lost), one, several)} left out")
        observed = observe(logs, made, lineage, named.guesses)
        groups = collectives.groups
        schedule = Schedule(lineage.routes, ranks, self.name, groups, failures=failures, observed=observed)
        return Recording(
            schedule, steps, self.ended(), tuple(doubts), tuple(notes), tasks=lineage.tasks, messages=named.ops
        )

    def lineage(
        self,
        logs: Sequence[RankLog],
        messages: Mapping[MessageId, Message],
        partner: Mapping[MessageId, MessageId],
    ) -> tuple[Lineage, list[str]]:
        """The lineage and caveats.  The lanes are given or observed; if the program failed, they may be guessed."""
        if self.lanes is not None:
            return trace(logs, messages, partner, self.lanes), []
        observed: Mapping[Lane, tuple[int, ...]] = {}
        try:
            lineage = complete(trace(logs, messages, partner), logs, messages.values(), partner)
        except RecordError:
            if not self.failed(logs):
                raise
        else:
            observed = lineage.routes
            if not self.failed(logs) or is_whole(lineage, logs):
                return lineage, []
        lanes = guess(observed, len(logs))
        shown = " and ".join(f"{lane} {' '.join(str(rank) for rank, _ in held)}" for lane, held in lanes.items())
        doubt = f"the ranks of the lanes are a guess ({shown}), because too few messages were received; give --lanes"
        return trace(logs, messages, partner, lanes), [doubt]

    def without_ops(self, error: RecordError) -> Recording:
        """The recording of a program that failed and whose ops cannot be named: how it failed."""
        lanes = self.lanes or guess({}, len(self.logs))
        routes = {lane: tuple(rank for rank, _ in holders) for lane, holders in lanes.items()}
        lineage = Lineage(routes, {}, frozenset(), ())
        messages = {m.id: m for log in self.logs for m in log.messages.values()}
        empty: tuple[Program, ...] = ((),) * len(self.logs)
        number = self.steps[self.step - 1]
        failures, ranks = conclude_failures(self.logs, self.codes, {}, messages, lineage, empty, number)
        schedule = Schedule(routes, ranks, self.name, failures=failures)
        return Recording(schedule, len(self.steps), self.ended(), (f"no op is written: {error}",), ())

    def failed(self, logs: Sequence[RankLog]) -> bool:
        return any(fails(log, self.codes) for log in logs)

    def ended(self) -> tuple[bool, ...]:
        return tuple(log.ended for log in self.logs)


def _notes_on_discarded(logs: Sequence[RankLog], steps: Sequence[int]) -> list[str]:
    """The training steps whose gradients no optimizer used."""
    found = {number: at for log in reversed(logs) for number, at in log.discarded.items()}
    return [
        f"step {count} ends without an optimizer's step: its gradients are thrown away at {found[number]}, as those of "
        "a step that is skipped or run again"
        for count, number in enumerate(steps, start=1)
        if number in found
    ]


def _has_boundary(message: Message, partner: Mapping[MessageId, MessageId], lineage: Lineage) -> bool:
    """Whether a message is matched or is between the ranks of neighbouring stages."""
    pair = {message.id.rank, message.peer}
    return message.id in partner or any(
        {one, other} == pair for route in lineage.routes.values() for one, other in pairwise(route)
    )


def _note_on_lost(message: Message) -> str:
    what = "send to" if message.send else "receive from"
    return f"rank {message.id.rank}: the {what} rank {message.peer} at {message.at} was never matched; it is left out"


def _check(lineage: Lineage, ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message]) -> None:
    """Raise ``RecordError``, with the line of the program, if the result is not a schedule."""
    lengths = {len(route) for route in lineage.routes.values()}
    if len(lengths) > 1:
        raise RecordError(
            "both lanes run the same model",
            " and ".join(
                f"lane {lane} has the ranks {' '.join(map(str, route))}" for lane, route in lineage.routes.items()
            ),
            "if the program finished, record only one pipeline",
        )
    for id, op in ops.items():
        try:
            check_slot((op,), lineage.routes)
        except ScheduleError as error:
            raise RecordError(
                error.rule, f"{error.got}: the message of rank {id.rank} at {messages[id].at}", "correct that message"
            ) from error


def assemble_events(
    events: Mapping[int, Sequence[Event]], name: str = "recorded", step: int | None = None, lanes: Lanes | None = None
) -> Recording:
    """Like ``assemble``, from the events that each rank kept in memory."""
    return assemble(read_all(events), name, step, lanes)
