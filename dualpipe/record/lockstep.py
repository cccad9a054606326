"""Whether the pipelines of a job run in step, so that a proof of one covers the collectives that they share.

The pipelines that share collectives, as those of tensor parallelism do, are proved one by one.  If all of them post and
wait for the same messages and collectives in the same order, they can run in step: whenever a rank joins a shared
collective, so do its counterparts in the other pipelines.  Then no rank waits for a rank of another pipeline, and
all of them end if one does.  If they do not run alike, their order is not covered by the proofs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product, zip_longest
from typing import NamedTuple

from dualpipe.record.events import Collective, RankLog

Ranks = tuple[int, ...]


class _Event(NamedTuple):
    """What a rank does with messages and collectives, as far as it is the same in pipelines that run in step."""

    what: tuple[object, ...]
    shown: str
    at: str


def shared(log: RankLog, pipeline: Ranks, step: int) -> list[Collective]:
    """The collectives of a training step in which ranks outside of the rank's pipeline take part."""
    found = (each for each in log.collectives.values() if each.step == step and each.within)
    return [each for each in found if not set(pipeline).issuperset(each.group)]


def apart(logs: Sequence[RankLog], pipelines: Sequence[Ranks], own: Ranks, step: int) -> str:
    """Why a pipeline does not run in step with those that it shares collectives with; empty if it does.

    ``logs`` are those of one training step of all ranks of the job, which has the number ``step``.
    """
    of_rank = {rank: (number, place) for number, ranks in enumerate(pipelines) for place, rank in enumerate(ranks)}
    joined, found = {own}, [own]
    while found:
        pipeline = found.pop()
        for each in (each for rank in pipeline for each in shared(logs[rank], pipeline, step)):
            members = [of_rank.get(rank) for rank in each.group]
            at = [place for place in members if place is not None]
            whole = set(product({number for number, _ in at}, {place for _, place in at}))
            if len(at) < len(members) or len(whole) != len(members):
                ranks = " ".join(map(str, each.group))
                return f"rank {each.id.rank} of the job calls {each.name} with the ranks {ranks} at {each.at}"
            others = {pipelines[number] for number, _ in at} - joined
            joined |= others
            found += others
    for other in sorted(joined - {own}):
        for ours, theirs in zip(own, other, strict=False):
            events = _events(logs[ours], own, step), _events(logs[theirs], other, step)
            for one, two in zip_longest(*events):
                if one is None or two is None or one.what != two.what:
                    return f"{_does(ours, one)}, where {_does(theirs, two)}"
    return ""


def _does(rank: int, event: _Event | None) -> str:
    return f"rank {rank} of the job {'does nothing more' if event is None else f'{event.shown} at {event.at}'}"


def _events(log: RankLog, pipeline: Ranks, step: int) -> list[_Event]:
    """The messages and collectives of a rank in the order of its program: what it posts, and what it waits for."""
    place = {rank: number for number, rank in enumerate(pipeline)}
    numbers: dict[tuple[str, int], int] = {}  # of the messages and collectives of this step
    groups: dict[str, int] = {}  # of those that no other pipeline has
    counts = _counts(log)
    found = []

    def own(kind: str, number: int) -> int:
        return numbers.setdefault((kind, number), len(numbers))

    for event in log.events:
        at = event.get("at", "")
        match event["event"]:
            case "post":
                ends = [(m["kind"], place.get(m["peer"], ("rank", m["peer"]))) for m in event["messages"]]
                new = [own("message", m["message"]) for m in event["messages"]]
                shown = " and ".join(f"posts a {m['kind']}" for m in event["messages"])
                found.append(_Event(("post", *ends, *new), shown, at))
            case "wait":
                waited = [own("message", number) for number in event["messages"]]
                found.append(_Event(("wait", *waited), "waits for a message", at))
            case "collective" if _within(log, event["collective"], step):
                each = log.collectives[event["collective"]]
                group: tuple[object, ...] = (each.group_name, counts[each.id.number])
                if place.keys() >= set(each.group):
                    number = groups.setdefault(each.group_name, len(groups))
                    group = (number, *sorted(place[rank] for rank in each.group))
                what = ("launch", each.name, each.form, *group, own("collective", each.id.number))
                found.append(_Event(what, f"calls {each.name}", each.at))
            case "collect" if _within(log, event["collective"], step):
                each = log.collectives[event["collective"]]
                what = ("collect", own("collective", each.id.number))
                found.append(_Event(what, f"waits for {each.name}", each.at))
    return found


def _within(log: RankLog, collective: int, step: int) -> bool:
    each = log.collectives[collective]
    return each.step == step and each.within


def _counts(log: RankLog) -> Mapping[int, int]:
    """For every collective how many its communicator has had on this rank before it, in all steps."""
    before: dict[str, int] = {}
    found = {}
    for each in log.collectives.values():
        found[each.id.number] = before.get(each.group_name, 0)
        before[each.group_name] = found[each.id.number] + 1
    return found
