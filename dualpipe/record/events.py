"""Read the events of each rank: its forwards, its messages, and the order of its events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dualpipe.errors import RuleError

Event = Mapping[str, Any]


class RecordError(RuleError):
    """A program that cannot be written as a schedule: what could not be named, and where in the program it is."""


class ForwardId(NamedTuple):
    """A forward, and with it the backward and the weight gradient of the same task: the rank and its own count."""

    rank: int
    number: int


class MessageId(NamedTuple):
    """A message end: the rank and its own count of messages."""

    rank: int
    number: int


class ModuleId(NamedTuple):
    """A module that a rank calls: the rank and its own count of modules."""

    rank: int
    number: int


@dataclass
class Forward:
    """A forward as its rank observed it.

    Attributes
    ----------
    module, at, step:
        The first module called, the line of the program, and the number of optimizer steps before it.
    messages, after:
        The receives and the forwards on the same rank whose tensors it takes.
    gradients:
        The receives whose tensors are the gradient of its output.
    weights:
        Whether it changed a weight gradient.
    backward_began:
        Whether its backward began.
    grad:
        Whether it began with gradients enabled.
    requested_at:
        Where the program requested gradients of weights from the engine; it may keep them elsewhere than in ``.grad``.
    untrainable:
        Whether none of its modules has a parameter to train.
    """

    id: ForwardId
    module: int
    at: str
    messages: list[MessageId] = field(default_factory=list)
    after: list[ForwardId] = field(default_factory=list)
    gradients: list[MessageId] = field(default_factory=list)
    weights: bool = False
    backward_began: bool = False
    grad: bool = True
    requested_at: str = ""
    untrainable: bool = False
    step: int = 0


@dataclass
class Message:
    """One end of a message.

    ``gradient_of`` and ``activation_of``: of a send, the forwards that its tensor belongs to.  ``memory``: the storage
    and the offset of the tensor, or ``None`` if unknown.
    """

    id: MessageId
    send: bool
    peer: int
    channel: tuple[Any, ...]
    group: str
    gradient_of: list[ForwardId]
    activation_of: list[ForwardId]
    form: str
    at: str
    step: int
    completed: bool = False
    tag: int = 0
    memory: tuple[int, int] | None = None


class Doubt(NamedTuple):
    """Something about a forward that a schedule cannot express; ``what`` is the kind, see ``notes``."""

    what: str
    forward: int
    at: str
    step: int


class Raised(NamedTuple):
    """The error that ended a rank.

    ``at`` is the line of the program and ``time`` in seconds since the epoch.  ``during`` is what the error left: a
    forward (F), a backward (B) or a wait for messages (M), and its numbers.
    """

    error: str
    text: str
    at: str
    time: float
    during: tuple[str, list[int]] | None


@dataclass
class RankLog:
    """The events of one rank, and the modules, forwards and messages in them.

    ``same`` maps a forward to the one that it turned out to be a part of; ``find`` resolves it.  ``raised`` is the
    error that ended the rank; ``waiting`` are the messages that it was waiting for at the end.
    """

    rank: int
    events: list[Event]
    forwards: dict[int, Forward]
    messages: dict[int, Message]
    modules: dict[int, tuple[str, frozenset[int]]]
    ended: bool
    steps: int
    same: dict[int, int]
    doubts: list[Doubt] = field(default_factory=list)
    raised: Raised | None = None
    waiting: list[int] = field(default_factory=list)

    def find(self, forward: int) -> int:
        while forward in self.same:
            forward = self.same[forward]
        return forward


def read(rank: int, events: Sequence[Event]) -> RankLog:
    """Read the events of a rank.  Raises ``RecordError`` for what a schedule file cannot express."""
    same = {e["part"]: e["forward"] for e in events if e["event"] == "join"}
    same |= _computed_again(events)
    log = RankLog(rank, _merge_optimizer_steps(events), {}, {}, {}, False, 0, same)
    for event in log.events:
        match event["event"]:
            case "module":
                log.modules[event["module"]] = (event["name"], frozenset(event["holds"]))
            case "forward":
                _read_forward(log, event)
            case "backward":
                for forward in event["forwards"]:
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.backward_began = True
                        known.untrainable = forward in event["untrainable"]
            case "gradients":
                for forward, messages in zip(event["forwards"], event["messages"], strict=True):
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.gradients += [MessageId(rank, m) for m in messages]
            case "weights":
                for forward in event["forwards"]:
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.weights = True
            case "weights requested":
                for forward in event["forwards"]:
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.requested_at = event["at"]
            case "post":
                _read_post(log, event)
            case "wait":
                log.waiting = [n for n in event["messages"] if not log.messages[n].completed]
            case "completed":
                for number in event["messages"]:
                    log.messages[number].completed = True
                    log.waiting = [n for n in log.waiting if n != number]
            case "any source":
                raise RecordError(
                    "a receive names its source rank",
                    f"rank {rank} receives from any rank at {event['at']}",
                    "give it a source",
                )
            case "doubt":
                log.doubts.append(Doubt(event["what"], log.find(event["forward"]), event["at"], log.steps))
            case "raised":
                during = event["during"] and tuple(event["during"])
                log.raised = Raised(event["error"], event["text"], event["place"], event["time"], during)
            case "step":
                log.steps += 1
            case "end":
                log.ended = True
    return log


def _merge_optimizer_steps(events: Sequence[Event]) -> list[Event]:
    """The events with one optimizer step in place of consecutive ones, and none before the first computation."""
    kept: list[Event] = []
    stepped = False  # reading backwards: whether there is a step between here and the next forward or backward
    for event in reversed(events):
        if event["event"] in ("forward", "backward"):
            stepped = False
        if event["event"] != "step" or not stepped:
            kept.append(event)
        stepped = stepped or event["event"] == "step"
    kept.reverse()
    computes = [index for index, event in enumerate(kept) if event["event"] in ("forward", "backward")]
    first = computes[0] if computes else len(kept)
    return [event for index, event in enumerate(kept) if event["event"] != "step" or index > first]


def _computed_again(events: Sequence[Event]) -> dict[int, int]:
    """Forwards that repeat, with gradients, an earlier one without: those whose outputs are not sent."""
    sends = [m for e in events if e["event"] == "post" for m in e["messages"] if m["kind"] == "send"]
    sent = {number for m in sends for letter, number in m["marks"] if letter == "F"}
    again = {e["forward"]: e["again"] for e in events if e["event"] == "forward" and e["again"] is not None}
    return {forward: earlier for forward, earlier in again.items() if forward not in sent}


def _read_forward(log: RankLog, event: Event) -> None:
    number = log.find(event["forward"])
    known = log.forwards.get(number)
    if known is None:
        known = Forward(ForwardId(log.rank, number), event["module"], event["at"], grad=event["grad"], step=log.steps)
        log.forwards[number] = known
    known.messages += [MessageId(log.rank, m) for m in event["messages"]]
    known.after += [ForwardId(log.rank, log.find(c)) for c in event["after"]]


def _read_post(log: RankLog, event: Event) -> None:
    for posted in event["messages"]:
        send = posted["kind"] == "send"
        ends = (log.rank, posted["peer"]) if send else (posted["peer"], log.rank)
        content: dict[str, list[ForwardId]] = {"B": [], "F": []}
        may_be_gradient = posted["real"] or posted["form"].startswith("complex")
        for letter, number in posted["marks"]:
            if letter in content and (letter != "B" or may_be_gradient):  # a backward may also make sizes to send
                content[letter].append(ForwardId(log.rank, log.find(number)))
        if event["inside"] not in ("", "backward") and posted["real"]:
            raise RecordError(
                "a stage does not communicate inside its forward",
                f"rank {log.rank} {posted['kind']}s inside {event['inside']} at {event['at']}",
                f"if that runs the whole pipeline, add --container {event['inside']}",
            )
        log.messages[posted["message"]] = Message(
            MessageId(log.rank, posted["message"]),
            send,
            posted["peer"],
            (*ends, posted["group_name"], posted["tag"]),
            posted["group_name"],
            content["B"],
            content["F"],
            posted["form"],
            event["at"],
            log.steps,
            tag=posted["tag"],
            memory=None if posted["memory"] is None else tuple(posted["memory"]),
        )


def read_folder(folder: Path, ranks: int | None, session: int, succeeded: bool = True) -> tuple[list[RankLog], int]:
    """The logs of one process group of a recorded command, and how many groups there were.

    Consecutive groups are distinguished by their number of ranks and by the order in which they were formed.  If the
    command failed, a rank that never joined the group has an empty log.
    """
    groups: dict[tuple[Any, ...], dict[int, list[Event]]] = {}
    for path in sorted(folder.glob("*.events"), key=lambda p: p.stat().st_mtime):
        lines = path.read_text().splitlines()
        events = [json.loads(line) for line in lines if line.endswith("}")]
        if not events or events[0]["event"] != "rank":
            continue
        head = events[0]
        size, number = head["ranks"], 0
        while head["rank"] in groups.get((size, number), {}):
            number += 1
        groups.setdefault((size, number), {})[head["rank"]] = events[1:]
    if not groups and ranks is not None and not succeeded:
        return [read(rank, []) for rank in range(ranks)], 0
    if not groups:
        raise RecordError(
            "a recorded program calls torch.distributed.init_process_group in Python",
            "no process of it did",
            "check that it runs; give -P if it expects to be started once a rank; do not start python with -I or -S",
        )
    fitting = [group for key, group in groups.items() if ranks in (None, key[0])] or list(groups.values())
    if not 1 <= session <= len(fitting):
        got = f"got {session}, and there were {len(fitting)}"
        raise RecordError("--session counts the process groups", got, "use one of them")
    chosen = fitting[session - 1]
    size = next(key[0] for key, group in groups.items() if group is chosen)
    missing = [rank for rank in range(size) if rank not in chosen]
    if missing and succeeded:
        raise RecordError(
            "every rank is recorded",
            f"rank {missing[0]} of {size} never joined the process group",
            "look at its output",
        )
    return [read(rank, chosen.get(rank, [])) for rank in range(size)], len(groups)
