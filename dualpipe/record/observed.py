"""What a schedule file says about the memory of the messages: their posts and waits, and what touched them between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dualpipe.record.events import Event as Logged
from dualpipe.record.events import ForwardId, MessageId, RankLog
from dualpipe.record.lineage import Lineage
from dualpipe.record.slots import Programs
from dualpipe.schedule import B, F, Kind, Op, Placed
from dualpipe.schedule.observed import Event, Guess, Observed, What

_OF_MARK = {"F": F, "B": B}


def observe(
    logs: Sequence[RankLog], made: Programs, lineage: Lineage, guesses: Mapping[MessageId, Sequence[Op]]
) -> Observed:
    """The events of the messages in the schedule, and the lines of all other ops.

    ``guesses`` are the messages whose names are uncertain, with the other ops that each could be.
    """
    placed = made.placed
    found = [Guess(placed[id], tuple(others)) for id, others in guesses.items() if id in placed]
    return Observed([_events(log, placed, lineage) for log in logs], found, made.lines)


def _events(log: RankLog, placed: Mapping[MessageId, Placed], lineage: Lineage) -> Iterator[Event]:
    dropped = _last_backward(log)
    keeps: dict[int, list[Placed]] = {}  # forward -> the messages whose memory its graph needs
    posts: dict[int, str] = {}  # message -> the line that made its post, also if a batch was posted later

    def place(message: int) -> Placed | None:
        return placed.get(MessageId(log.rank, message))

    for index, event in enumerate(log.events):
        match event["event"]:
            case "post":
                for posted in event["messages"]:
                    posts[posted["message"]] = posted.get("at") or event["at"]
                    if (at := place(posted["message"])) is not None:
                        yield Event(What.POST, at, None, posts[posted["message"]])
            case "completed":
                for message in event["messages"]:
                    if (at := place(message)) is not None:
                        yield Event(What.WAIT, at, None, event["at"])
            case "access" if (at := place(event["message"])) is not None:
                line = posts[event["posted"]] if event["posted"] in posts else event["at"]
                yield Event(What(event["what"]), at, _by(log, event, placed, lineage), line)
            case "keep" if (at := place(event["message"])) is not None:
                forward = log.find(event["forward"])
                keeps.setdefault(forward, []).append(at)
                yield Event(What.KEEP, at, _op(F, log, forward, lineage), event["at"])
        for forward in [forward for forward in keeps if dropped.get(forward) == index]:
            for at in keeps.pop(forward):
                yield Event(What.DROP, at, _op(F, log, forward, lineage), event["at"])


def _by(log: RankLog, event: Logged, placed: Mapping[MessageId, Placed], lineage: Lineage) -> Op | None:
    """The op that touched the memory: a message, or the forward or backward in progress."""
    if event["posted"] is not None:
        at = placed.get(MessageId(log.rank, event["posted"]))
        return None if at is None else at.op
    ops = [_op(_OF_MARK[letter], log, forward, lineage) for letter, forward in event["by"]]
    return ops[0] if len(ops) == 1 else None


def _op(kind: Kind, log: RankLog, forward: int, lineage: Lineage) -> Op | None:
    task = lineage.tasks.get(ForwardId(log.rank, log.find(forward)))
    return None if task is None else Op(kind, *task)


def _last_backward(log: RankLog) -> dict[int, int]:
    """For every forward the last event of its backward and of its weight gradients; then its graph needs nothing."""
    last: dict[int, int] = {}
    for index, event in enumerate(log.events):
        if event["event"] in ("backward", "weights", "weights requested"):
            last.update(dict.fromkeys(map(log.find, event["forwards"]), index))
    return last
