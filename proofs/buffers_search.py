"""The check ``buffers`` by plain search: one pass over the events of each rank.

The events are those of a recorded run (``dualpipe.schedule.observed``).  A message is in flight from its post to its
wait.  In that time NCCL reads the memory of a send and writes that of a receive, so the program may touch neither, but
for reading what it sends.  From ``keep`` to ``drop`` a graph needs the memory, and nothing may write to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dualpipe.schedule import SENDS, Op, Placed, Schedule
from dualpipe.schedule.observed import Event, What
from proofs.findings import Overwritten, TouchedInFlight
from proofs.verdict import Proved, Refuted, Verdict

TOUCHES = frozenset({What.READ, What.WRITE, What.FREE})


def buffers(schedule: Schedule) -> Verdict:
    """No rank touches the memory of a message in flight, or writes to memory that a graph still needs."""
    found = [fault for own in schedule.observed.events for fault in faults(own)]
    return Refuted(min(found, key=_weight)) if found else Proved()


def _weight(fault: TouchedInFlight | Overwritten) -> tuple[bool, int, int]:
    """Sorts faults by time; memory that two receives share comes first, as it makes names of messages uncertain."""
    placed = fault.places()[0]
    return not (isinstance(fault, TouchedInFlight) and fault.is_shared), placed.slot, placed.rank


def in_shared_memory(schedule: Schedule, rank: int) -> frozenset[Placed]:
    """The receives of a rank that were in flight into the same memory as another one.

    The names of received messages are found from the use of their memory, so these names may be exchanged.
    """
    events = schedule.observed.events[rank] if schedule.observed else ()
    pairs = [fault for fault in faults(events) if isinstance(fault, TouchedInFlight) and fault.is_shared]
    names = {fault.by for fault in pairs}
    posted = {event.message for event in events if event.what is What.POST and event.message.op in names}
    return frozenset({fault.message for fault in pairs} | posted)


def faults(events: Sequence[Event]) -> Iterator[TouchedInFlight | Overwritten]:
    """All faults in the events of one rank."""
    in_flight: dict[Placed, list[str]] = {}  # message -> the places of its posts that have had no wait
    needed: dict[Placed, dict[Op | None, str]] = {}  # message -> the forwards whose graphs need its memory, and where
    for index, (what, message, by, place) in enumerate(events):
        if what is What.POST:
            in_flight.setdefault(message, []).append(place)
        elif what is What.WAIT and in_flight.get(message):
            in_flight[message].pop(0)
        elif what is What.KEEP:
            needed.setdefault(message, {})[by] = place
        elif what is What.DROP:
            needed.get(message, {}).pop(by, None)
        elif what in TOUCHES and in_flight.get(message) and not (what is What.READ and message.op.kind in SENDS):
            waited = next((e.place for e in events[index:] if e.what is What.WAIT and e.message == message), None)
            yield TouchedInFlight(message, what, by, in_flight[message][0], place, waited)
        elif what is What.WRITE:
            for forward, kept in needed.get(message, {}).items():
                drops = (e.place for e in events[index:] if (e.what, e.message, e.by) == (What.DROP, message, forward))
                if forward is not None and (used := next(drops, None)) is not None:
                    yield Overwritten(message, forward, by, kept, place, used)
