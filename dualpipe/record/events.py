"""What each rank wrote down, read back: its forwards, its messages, and its events in order.

Every wait, forward and message knows its place in the rank's order, so that slots can be told apart later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dualpipe.errors import RuleError

Event = Mapping[str, Any]


class RecordError(RuleError):
    """A recording that cannot be made into a schedule; it says what could not be named, and where it is."""


class Owner(NamedTuple):
    """A forward of a rank, and with it that microbatch's backward and weight gradient at that stage."""

    rank: int
    number: int


class MessageId(NamedTuple):
    """A message end: the rank and its own count of messages."""

    rank: int
    number: int


@dataclass
class Forward:
    """A forward as its rank saw it: the module called, the messages and the local forwards that it began from.

    ``gradients`` are the messages that bring the gradient of what it made.  ``grad`` says whether it began with
    gradients on, ``behind`` whether its backward began, and ``weights`` whether anything of it reached a weight
    gradient.  ``weighed`` is where the engine was asked for gradients of weights, which the program may keep elsewhere,
    and ``weightless`` says that no module of it has a parameter to train.
    """

    owner: Owner
    module: int
    at: str
    messages: list[MessageId] = field(default_factory=list)
    after: list[Owner] = field(default_factory=list)
    gradients: list[MessageId] = field(default_factory=list)
    weights: bool = False
    behind: bool = False
    grad: bool = True
    weighed: str = ""
    weightless: bool = False
    step: int = 0


@dataclass
class Message:
    """One end of a message: a send with what it held, or a receive.

    ``memory`` is where its tensor begins, a storage and an offset, or ``None`` where that is not known.
    """

    id: MessageId
    send: bool
    peer: int
    channel: tuple[Any, ...]
    gradient_of: list[Owner]
    activation_of: list[Owner]
    form: str
    at: str
    step: int
    over: bool = False
    tag: int = 0
    memory: tuple[int, int] | None = None


class Doubt(NamedTuple):
    """What was seen of a forward that a schedule cannot say; ``what`` is a key of ``doubts.TOLD``."""

    what: str
    forward: int
    at: str
    step: int


@dataclass
class RankLog:
    """The events of one rank, and what they speak of."""

    rank: int
    events: list[Event]
    forwards: dict[int, Forward]
    messages: dict[int, Message]
    modules: dict[int, tuple[str, frozenset[int]]]
    ended: bool
    steps: int
    same: dict[int, int]
    doubts: list[Doubt] = field(default_factory=list)

    def find(self, forward: int) -> int:
        while forward in self.same:
            forward = self.same[forward]
        return forward


def read(rank: int, events: Sequence[Event]) -> RankLog:
    """The events of a rank, understood.  Raises ``RecordError`` where the program did what has no place in a file."""
    same = {e["part"]: e["forward"] for e in events if e["event"] == "join"}
    same |= _computed_again(events)
    log = RankLog(rank, _one_step_event_a_step(events), {}, {}, {}, False, 0, same)
    for event in log.events:
        match event["event"]:
            case "module":
                log.modules[event["module"]] = (event["name"], frozenset(event["holds"]))
            case "forward":
                _read_forward(log, event)
            case "backward":
                for forward in event["forwards"]:
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.behind = True
                        known.weightless = forward in event["weightless"]
            case "gradients":
                for forward, messages in zip(event["forwards"], event["messages"], strict=True):
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.gradients += [MessageId(rank, m) for m in messages]
            case "weights":
                for forward in event["forwards"]:
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.weights = True
            case "weighed":
                for forward in event["forwards"]:
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.weighed = event["at"]
            case "post":
                _read_post(log, event)
            case "over":
                for number in event["messages"]:
                    log.messages[number].over = True
            case "any source":
                raise RecordError(
                    "a receive names the rank that it is from",
                    f"rank {rank} receives from any rank at {event['at']}",
                    "give it a source",
                )
            case "doubt":
                log.doubts.append(Doubt(event["what"], log.find(event["forward"]), event["at"], log.steps))
            case "step":
                log.steps += 1
            case "end":
                log.ended = True
    return log


def _one_step_event_a_step(events: Sequence[Event]) -> list[Event]:
    """The events with one optimizer step where several follow each other, and with none before all computation."""
    kept: list[Event] = []
    over = False  # whether a step has been seen since the last forward or backward
    for event in reversed(events):
        if event["event"] in ("forward", "backward"):
            over = False
        if event["event"] != "step" or not over:
            kept.append(event)
        over = over or event["event"] == "step"
    kept.reverse()
    computes = [index for index, event in enumerate(kept) if event["event"] in ("forward", "backward")]
    first = computes[0] if computes else len(kept)
    return [event for index, event in enumerate(kept) if event["event"] != "step" or index > first]


def _computed_again(events: Sequence[Event]) -> dict[int, int]:
    """Forwards that do again, with gradients, what was done without: those that send nothing of their own."""
    told = [m for e in events if e["event"] == "post" for m in e["messages"] if m["kind"] == "send"]
    sent = {number for m in told for letter, number in m["marks"] if letter == "F"}
    again = {e["forward"]: e["again"] for e in events if e["event"] == "forward" and e["again"] is not None}
    return {forward: earlier for forward, earlier in again.items() if forward not in sent}


def _read_forward(log: RankLog, event: Event) -> None:
    number = log.find(event["forward"])
    known = log.forwards.get(number)
    if known is None:
        known = Forward(Owner(log.rank, number), event["module"], event["at"], grad=event["grad"], step=log.steps)
        log.forwards[number] = known
    known.messages += [MessageId(log.rank, m) for m in event["messages"]]
    known.after += [Owner(log.rank, log.find(c)) for c in event["after"]]


def _read_post(log: RankLog, event: Event) -> None:
    for told in event["messages"]:
        send = told["kind"] == "send"
        ends = (log.rank, told["peer"]) if send else (told["peer"], log.rank)
        held: dict[str, list[Owner]] = {"B": [], "F": []}
        for letter, number in told["marks"]:
            if letter in held:
                held[letter].append(Owner(log.rank, log.find(number)))
        if event["inside"] and told["real"]:
            raise RecordError(
                "a stage does not communicate inside its forward or backward",
                f"rank {log.rank} {told['kind']}s inside {event['inside']} at {event['at']}",
                f"if that runs the whole pipeline, add --container {event['inside']}",
            )
        log.messages[told["message"]] = Message(
            MessageId(log.rank, told["message"]),
            send,
            told["peer"],
            (*ends, tuple(told["group"]), told["tag"]),
            held["B"],
            held["F"],
            told["form"],
            event["at"],
            log.steps,
            tag=told["tag"],
            memory=None if told["memory"] is None else tuple(told["memory"]),
        )
        if told["group_number"]:
            log.doubts.append(Doubt("several groups", -1, event["at"], log.steps))


def read_folder(folder: Path, ranks: int | None, session: int) -> tuple[list[RankLog], int]:
    """The logs of one process group that met in a recorded command, and how many groups there were.

    Several groups, one after another, are told apart by their number of ranks and by the order in which they met.
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
    if not groups:
        raise RecordError(
            "a recorded program calls torch.distributed.init_process_group in Python",
            "no process of it did",
            "check that it runs; give -P if it wants its ranks to be launched; do not start python with -I or -S",
        )
    fitting = [group for key, group in groups.items() if ranks in (None, key[0])] or list(groups.values())
    if not 1 <= session <= len(fitting):
        raise RecordError("--session counts the process groups", f"there were {len(fitting)}", f"it is {session}")
    chosen = fitting[session - 1]
    size = next(key[0] for key, group in groups.items() if group is chosen)
    missing = [rank for rank in range(size) if rank not in chosen]
    if missing:
        raise RecordError(
            "every rank is recorded",
            f"rank {missing[0]} of {size} never joined the process group",
            "look at its output",
        )
    return [read(rank, chosen[rank]) for rank in range(size)], len(groups)
