"""Read the events of each rank: its forwards, its messages, and the order of its events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualpipe.record.log import Arrival as Arrival
from dualpipe.record.log import Collective as Collective
from dualpipe.record.log import CollectiveId as CollectiveId
from dualpipe.record.log import Doubt as Doubt
from dualpipe.record.log import Event as Event
from dualpipe.record.log import Forward as Forward
from dualpipe.record.log import ForwardId as ForwardId
from dualpipe.record.log import Message as Message
from dualpipe.record.log import MessageId as MessageId
from dualpipe.record.log import ModuleId as ModuleId
from dualpipe.record.log import Owed as Owed
from dualpipe.record.log import Raised as Raised
from dualpipe.record.log import RankLog as RankLog
from dualpipe.record.log import RecordError as RecordError
from dualpipe.record.log import Taken as Taken


def read_all(events: Mapping[int, Sequence[Event]]) -> list[RankLog]:
    """Read the events of all ranks, in order of rank.

    A training step without an optimizer's step counts only if all ranks that compute end it so.
    """
    logs = [read(rank, events[rank]) for rank in sorted(events)]
    ends = {tuple(log.discarded) for log in logs if log.forwards}
    return logs if len(ends) < 2 else [read(rank, _without_discarded(events[rank])) for rank in sorted(events)]


def _without_discarded(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event["event"] != "discarded"]


def read(rank: int, events: Sequence[Event]) -> RankLog:
    """Read the events of a rank.  Raises ``RecordError`` for what a schedule file cannot express."""
    same = {e["part"]: e["forward"] for e in events if e["event"] == "join"}
    same |= _computed_again(events)
    log = RankLog(rank, _merge_optimizer_steps(events), {}, {}, {}, False, 0, same)
    begun = False  # whether the training step has
    for event in log.events:
        begun = begun or event["event"] in _BEGINS
        if event["event"] not in ("poll", "stopped") and log.polling:
            log.waiting, log.polling = [], False
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
                        known.sharded = forward in event.get("sharded", ())
            case "gradients":
                for forward, messages in zip(event["forwards"], event["messages"], strict=True):
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.gradients += [MessageId(rank, m) for m in messages]
            case "weights":
                for forward in event["forwards"]:
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.weights = True
            case "owed":
                if (known := log.forwards.get(log.find(event["forward"]))) is not None:
                    known.owed |= {number: Owed(name, how, event["at"]) for number, name, how in event["parameters"]}
            case "fed":
                if (known := log.forwards.get(log.find(event["forward"]))) is not None:
                    known.fed |= set(event["parameters"])
            case "paid":
                known = log.forwards.get(log.find(event["forward"]))
                if known is not None and known.step == log.steps:
                    known.paid |= set(event["parameters"])
                elif known is not None:
                    known.paid_at = event["at"]
            case "weights requested":
                for forward in event["forwards"]:
                    if (known := log.forwards.get(log.find(forward))) is not None:
                        known.requested_at = event["at"]
            case "post":
                _read_post(log, event)
            case "wait":
                log.waiting = [n for n in event["messages"] if not log.messages[n].completed]
            case "poll":
                log.waiting, log.polling = list(event["messages"]), True
            case "collective":
                _read_collective(log, event, begun)
            case "collect":
                log.collecting = event["collective"]
            case "collected":
                log.collecting = None
            case "arrived":
                log.arrivals[event["arrival"]] = Arrival(event["how"], event["collective"])
            case "arrival":
                step = log.steps
                log.taken += [
                    Taken(event["forward"], n, event["at"], step, event["backward"]) for n in event["arrivals"]
                ]
            case "changed":
                log.changed.append((event["name"], event["at"], log.steps))
            case "left":
                log.left.add(event["how"])
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
                log.raised = Raised(
                    event["error"], event["text"], event["place"], event["time"], during, event.get("freed", "")
                )
            case "step":
                if (at := event.get("discarded")) is not None:
                    log.discarded[log.steps] = at
                log.steps += 1
                begun = False
            case "end":
                log.ended = True
    return log


def _merge_optimizer_steps(events: Sequence[Event]) -> list[Event]:
    """The events with one optimizer step in place of consecutive ones, and none before the first computation.

    Gradients that are thrown away are the end of a training step, too, if the program computes before the next one.
    """
    kept: list[Event] = []
    computes_later = False
    stepped = False  # reading backwards: whether there is a step between here and the next forward or backward
    for event in reversed(events):
        if event["event"] in ("forward", "backward"):
            stepped, computes_later = False, True
        if event["event"] == "discarded":
            if stepped or not computes_later:
                continue
            event = {**event, "event": "step", "discarded": event["at"]}
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


_BEGINS = frozenset({"forward", "backward", "post"})


def _read_collective(log: RankLog, event: Event, begun: bool) -> None:
    log.collectives[event["collective"]] = Collective(
        CollectiveId(log.rank, event["collective"]),
        event["name"],
        tuple(event["group"]),
        event["group_name"],
        tuple(event["form"]),
        tuple(event["modules"]),
        tuple(event["names"]),
        any(letter in "FB" for letter, _ in event["marks"]),
        tuple(sorted({log.find(number) for letter, number in event["context"] if letter in "FB"})),
        event["at"],
        log.steps,
        begun,
        tuple(event.get("values", ())),
        tuple(sorted({log.find(number) for letter, number in event["marks"] if letter == "F"})),
    )


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
        # a backward also makes weight gradients, and sizes to send
        may_be_gradient = (posted["real"] or posted["form"].startswith("complex")) and not posted["weights"]
        for letter, number in posted["marks"]:
            if letter in content and (letter != "B" or may_be_gradient):
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
            posted.get("at") or event["at"],
            log.steps,
            tag=posted["tag"],
            weights=tuple(posted["weights"]),
            memory=None if posted["memory"] is None else tuple(posted["memory"]),
            passed_on=tuple(MessageId(log.rank, number) for letter, number in posted["marks"] if letter == "M"),
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
            "no process called it",
            "check that it runs; give -P if it must be started once for each rank; do not start python with -I or -S",
        )
    fitting = [group for key, group in groups.items() if ranks in (None, key[0])] or list(groups.values())
    if not 1 <= session <= len(fitting):
        got = f"got {session}, and there were {len(fitting)}"
        raise RecordError("--session is the number of a process group, from 1", got, "use one of them")
    chosen = fitting[session - 1]
    size = next(key[0] for key, group in groups.items() if group is chosen)
    missing = [rank for rank in range(size) if rank not in chosen]
    if missing and succeeded:
        raise RecordError(
            "every rank is recorded",
            f"rank {missing[0]} of {size} never joined the process group",
            "look at its output",
        )
    return read_all({rank: chosen.get(rank, []) for rank in range(size)}), len(groups)
