"""How far a lane goes that was cut short: by whom its last stage waits for, though nobody there computed anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dualpipe.record.events import Message, MessageId, RankLog
from dualpipe.record.names import Lineage, Name
from dualpipe.schedule import DOWN, UP, Lane

Route = tuple[int, ...]


@dataclass(frozen=True)
class _Seen:
    """What tells where a lane goes on: messages of all ranks, who met whom, and the ranks that did not end."""

    messages: Collection[Message]
    partner: Mapping[MessageId, MessageId]
    lineage: Lineage
    running: frozenset[int]

    def onward(self, lane: Lane, route: Route) -> set[int]:
        """Where the last stage of a lane sends its activations, if the lane has not been there yet."""
        last = Name(lane, len(route) - 1, 0)
        return {
            m.peer
            for m in self.messages
            if m.id.rank == route[-1] and m.send and not m.gradient_of and m.peer not in route
            if m.peer in self.running or m.id not in self.partner
            for owner in m.activation_of
            if (name := self.lineage.names.get(owner)) is not None and replace(name, mb=0) == last
        }

    def awaiting(self, route: Route) -> set[int]:
        """The ranks without a forward that wait for the last stage of a lane, or it for them."""
        started = {owner.rank for owner in self.lineage.names}.union(*self.lineage.routes.values(), route)
        pairs = [{m.id.rank, m.peer} for m in self.messages if m.id not in self.partner]
        return {rank for pair in pairs if route[-1] in pair for rank in pair if rank not in started}


def lengthen(
    lineage: Lineage, logs: Sequence[RankLog], messages: Collection[Message], partner: Mapping[MessageId, MessageId]
) -> Lineage:
    """The lineage with every lane as long as the messages of its last stages tell."""
    running = frozenset(log.rank for log in logs if not log.ended)
    seen = _Seen(messages, partner, lineage, running)
    routes = dict(lineage.routes)
    notes: list[str] = []
    for lane in routes:
        seen = replace(seen, lineage=replace(lineage, routes=routes))
        while len(found := seen.onward(lane, routes[lane]) or seen.awaiting(routes[lane])) == 1:
            routes[lane] = (*routes[lane], *found)
            notes.append(
                f"rank {routes[lane][-1]} ran no forward of lane {lane}; that it holds stage {len(routes[lane]) - 1} "
                "is concluded from the messages that it exchanges with the stage before"
            )
    if len(routes) == len(Lane) and running and (whole := _overlapped(routes[UP], routes[DOWN][::-1])):
        for lane, route in zip(routes, (whole, whole[::-1]), strict=True):
            if route != routes[lane]:
                notes.append(f"lane {lane} is cut short at stage {len(routes[lane]) - 1}; the rest is the other lane's")
                routes[lane] = route
    return replace(lineage, routes=routes, notes=(*lineage.notes, *notes))


def _overlapped(one: Route, other: Route) -> Route | None:
    """The route that begins as one and ends as the other, where they have ranks in common and those fit."""
    for common in range(min(len(one), len(other)), 0, -1):
        if one[-common:] == other[:common]:
            return one + other[common:]
    return None
