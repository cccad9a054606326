"""Complete the routes of a run that was cut short, from the messages of each lane's last known stage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from dualpipe.record.events import Message, MessageId, RankLog
from dualpipe.record.lineage import Lineage
from dualpipe.schedule import DOWN, UP, Chunk, Lane

Route = tuple[int, ...]


@dataclass(frozen=True)
class _Evidence:
    """What shows where a lane continues: all messages, which were matched, and the ranks that did not end."""

    messages: Collection[Message]
    partner: Mapping[MessageId, MessageId]
    lineage: Lineage
    running: frozenset[int]

    def next_ranks(self, lane: Lane, route: Route) -> set[int]:
        """The ranks not in the route to which its last stage sends activations."""
        last = Chunk(lane, len(route) - 1)
        return {
            m.peer
            for m in self.messages
            if m.id.rank == route[-1] and m.send and not m.gradient_of and m.peer not in route
            if m.peer in self.running or m.id not in self.partner
            for forward in m.activation_of
            if (task := self.lineage.tasks.get(forward)) is not None and task.chunk == last
        }

    def waiting_ranks(self, route: Route) -> set[int]:
        """The ranks without a forward that wait for the last stage of the route, or that it waits for."""
        started = {forward.rank for forward in self.lineage.tasks}.union(*self.lineage.routes.values(), route)
        pairs = [{m.id.rank, m.peer} for m in self.messages if m.id not in self.partner]
        return {rank for pair in pairs if route[-1] in pair for rank in pair if rank not in started}


def complete(
    lineage: Lineage, logs: Sequence[RankLog], messages: Collection[Message], partner: Mapping[MessageId, MessageId]
) -> Lineage:
    """The lineage with every lane extended as far as the messages of its last stages show."""
    running = frozenset(log.rank for log in logs if not log.ended)
    evidence = _Evidence(messages, partner, lineage, running)
    routes = dict(lineage.routes)
    notes: list[str] = []
    for lane in routes:
        evidence = replace(evidence, lineage=replace(lineage, routes=routes))
        while len(found := evidence.next_ranks(lane, routes[lane]) or evidence.waiting_ranks(routes[lane])) == 1:
            routes[lane] = (*routes[lane], *found)
            notes.append(
                f"rank {routes[lane][-1]} ran no forward of lane {lane}; that it holds stage {len(routes[lane]) - 1} "
                "is concluded from the messages that it exchanges with the stage before"
            )
    if len(routes) == len(Lane) and running and (whole := _overlapped(routes[UP], routes[DOWN][::-1])):
        for lane, route in zip(routes, (whole, whole[::-1]), strict=True):
            if route != routes[lane]:
                notes.append(
                    f"lane {lane} was cut short at stage {len(routes[lane]) - 1}; the rest is taken from the other lane"
                )
                routes[lane] = route
    return replace(lineage, routes=routes, notes=(*lineage.notes, *notes))


def is_whole(lineage: Lineage, logs: Sequence[RankLog]) -> bool:
    """Whether all lanes are as long as each other and show their ends.

    A lane shows its end by holding every rank, or by a backward of its last stage that began without a gradient from
    another rank.
    """
    routes = lineage.routes
    ended = {
        task.lane
        for forward, task in lineage.tasks.items()
        if task.stage == len(routes[task.lane]) - 1
        if (of := logs[forward.rank].forwards.get(forward.number)) is not None and of.backward_began
        if not of.gradients
    }
    ended |= {lane for lane, route in routes.items() if len(set(route)) == len(logs)}
    return len(set(map(len, routes.values()))) == 1 and ended == routes.keys()


def _overlapped(one: Route, other: Route) -> Route | None:
    """The route that begins with one and ends with the other, if they have ranks in common and agree on those."""
    for common in range(min(len(one), len(other)), 0, -1):
        if one[-common:] == other[:common]:
            return one + other[common:]
    return None
