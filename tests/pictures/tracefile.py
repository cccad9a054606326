"""What is wrong with a trace: a reader of the trace event format who knows the schedule, and not how it was written."""

from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

from dualpipe.schedule import COMPUTE, MESSAGES, SENDS, Schedule

Event = dict[str, Any]
FIELDS = {
    "M": {"name", "pid", "tid", "args"},
    "X": {"name", "cat", "pid", "tid", "ts", "dur", "args"},
    "C": {"name", "pid", "tid", "ts", "args"},
    "s": {"name", "cat", "id", "pid", "tid", "ts"},
    "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
}


def complaints(trace: dict[str, Any], schedule: Schedule, runs: dict[str, int]) -> list[str]:
    """Everything that does not fit the format or the schedule, which ``runs[process name]`` times was run."""
    events: list[Event] = trace["traceEvents"]
    found = [f"fields of {event}" for event in events if FIELDS.get(event.get("ph", ""), set()) != set(event) - {"ph"}]
    if found:
        return found
    times = [event["ts"] for event in events if event["ph"] != "M"]
    found += [f"time goes back to {b}" for a, b in pairwise(times) if b < a]
    found += [f"lasts {event['dur']}: {event['name']}" for event in events if event.get("dur", 0) < 0]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    if sorted(names.values()) != sorted(runs):
        return [*found, f"processes are {names}"]
    found += nesting(events)
    for pid, name in names.items():
        own = [event for event in events if event["pid"] == pid]
        found += unnamed(own) + slices(own, schedule, runs[name]) + arrows(own, schedule) + counters(own)
    return found


def slices_of(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def nesting(events: list[Event]) -> list[str]:
    """On a track a slice lies within another or apart from it."""
    tracks: defaultdict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in slices_of(events):
        tracks[event["pid"], event["tid"]].append(event)
    found = []
    for track, own in tracks.items():
        ends: list[float] = []
        for event in own:
            while ends and ends[-1] <= event["ts"] + 1e-6:
                ends.pop()
            end = event["ts"] + event["dur"]
            if ends and end > ends[-1] + 2e-3:  # start and length are each rounded to a nanosecond
                found.append(f"{event['name']} leaves what it began in, on track {track}")
            ends.append(end)
    return found


def unnamed(events: list[Event]) -> list[str]:
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    return [f"track {tid} has no name" for tid in {event["tid"] for event in slices_of(events)} - named]


def slices(events: list[Event], schedule: Schedule, runs: int) -> list[str]:
    """Every op of the schedule is a slice as often as it ran, on its rank, with its facts."""
    kinds = {str(kind) for kind in COMPUTE | MESSAGES}
    found = []
    expected = Counter({(placed.rank, str(placed.op)): runs for placed in schedule})
    seen = Counter((event["args"]["rank"], event["name"]) for event in slices_of(events) if event["cat"] in kinds)
    found += [f"op {op} is there {seen[op]} times, not {runs}" for op in expected | seen if seen[op] != expected[op]]
    facts = {(p.rank, str(p.op)): p for p in schedule}
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    for event in slices_of(events):
        args = event["args"]
        track = tracks.get(event["tid"], "")
        if not f"{track} ".startswith(f"rank {args['rank']} "):
            found.append(f"{event['name']} of rank {args['rank']} is on the track of {track}")
        if event["cat"] in kinds and (placed := facts.get((args["rank"], event["name"]))) is not None:
            op = placed.op
            right = {"slot": placed.slot, "stage": op.stage, "mb": op.mb, "lane": str(op.lane)}
            right["needs"] = [str(need) for need in schedule.needs(op)]
            if event["cat"] != op.kind or args | right != args:
                found.append(f"facts of {event['name']}: {event['cat']}, {args}")
    return found


def arrows(events: list[Event], schedule: Schedule) -> list[str]:
    """Every send has an arrow, which begins within it and ends within the receive that needs it, not earlier."""
    found = []
    starts = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    both = sum(event["ph"] in "sf" for event in events)
    if starts.keys() != ends.keys() or len(starts) + len(ends) != both:
        found.append("arrows without both ends, or with the same id")
    ops = {str(placed.op): placed.op for placed in schedule}
    sends = {event["name"]: 0 for event in slices_of(events) if event["cat"] in SENDS}
    for number in starts.keys() & ends.keys():
        tail, head = around(events, starts[number]), around(events, ends[number])
        if tail is None or head is None or starts[number]["ts"] > ends[number]["ts"]:
            found.append(f"arrow {number} does not go from a message on to another")
            continue
        sends[tail["name"]] = sends.get(tail["name"], 0) + 1
        needs = [str(need) for need in schedule.needs(ops[head["name"]])]
        if needs != [tail["name"]] or tail["args"]["peer"] != head["args"]["rank"]:
            found.append(f"arrow {number} goes from {tail['name']} to {head['name']}")
    messages = Counter(event["name"] for event in slices_of(events) if event["cat"] in SENDS)
    found += [f"{name} has {count} arrows" for name, count in sends.items() if count != messages[name]]
    return found


def around(events: list[Event], point: Event) -> Event | None:
    """The slice of a track that is there at a point."""
    inside = [
        event
        for event in slices_of(events)
        if event["tid"] == point["tid"] and event["ts"] <= point["ts"] <= event["ts"] + event["dur"]
    ]
    return inside[-1] if inside else None


def counters(events: list[Event]) -> list[str]:
    """Counters are never negative; what is live at the end is nothing."""
    values: defaultdict[str, list[int]] = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            values[event["name"]].append(event["args"]["value"])
    low = [f"{name} is {min(levels)}" for name, levels in values.items() if min(levels) < 0]
    return low + [f"{name} ends with {v[-1]}" for name, v in values.items() if name.startswith("live") and v[-1]]
