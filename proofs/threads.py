"""What each rank posts and waits for under a model of communication, as numbers (``proofs.models``).

A *counter* counts what one side has posted: the sends of an ordered pair of ranks, its receives, or the collectives of
a group that one member joins.  Matching is by position, so every wait is for a counter to reach a number.  A rank is a
list of steps.  It posts the messages of a step, and goes to the next step when all waits of the step have ended::

    blocking      step = message slot    posts its messages       waits for the other side of each
    eager(c)      as blocking, but the counters of receives start at c
    edge          step = message slot    posts its messages       waits for the receives that the next computes need
    all           step = collective      posts it                 waits for the other members; under edge, before it,
                                                                  for everything that the rank has posted
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass, field

from proofs.models import Model
from proofs.table import IS_COMPUTE, IS_MESSAGE, IS_SEND, WIDTH, Row, Table

NEVER = 0
"""The counter that is never increased."""
BUFFER = 1
"""The counter that a send waits for if no other rank receives it: never increased, but it may start above zero."""
AT_END = -1
"""In place of the number of an op: the end of a rank's program."""
_BITS = 32
_COUNTER = (1 << _BITS) - 1
"""A number and a counter in one integer: millions of pairs would cost the garbage collector more than the search."""


@dataclass
class Thread:
    """The steps of one rank.

    ``posts`` are the counters that the steps increase.  ``waits`` are the counters that they wait for, each until it is
    at least the number in ``until``.  Those of step s end at ``post_ends[s]`` and ``wait_ends[s]``, and begin where
    those of the step before end.  ``ops`` has for each wait the number of the op that waits, or is ``None`` if the
    caller does not need it.
    """

    posts: array[int] = field(default_factory=lambda: array("i"))
    post_ends: array[int] = field(default_factory=lambda: array("i"))
    waits: array[int] = field(default_factory=lambda: array("i"))
    until: array[int] = field(default_factory=lambda: array("i"))
    wait_ends: array[int] = field(default_factory=lambda: array("i"))
    ops: list[int] | None = None

    def wait(self, counter: int, until: int, op: int) -> None:
        """Add a wait of the current step."""
        self.waits.append(counter)
        self.until.append(until)
        if self.ops is not None:
            self.ops.append(op)

    def end_step(self) -> None:
        self.post_ends.append(len(self.posts))
        self.wait_ends.append(len(self.waits))


class Counters:
    """The counters of a schedule."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.wakes: list[tuple[int, ...]] = [(), ()]
        """For each counter the ranks that may go on when it increases."""
        self.pairs: dict[tuple[int, int], int] = {}
        """For each ordered pair of ranks the counter of its sends; that of its receives is the next one."""
        self.members: dict[tuple[int, int], int] = {}
        """For each member of a group the counter of the collectives that it joins."""
        self.astray: dict[int, tuple[int, int]] = {}
        """Each send that no other rank can receive has a counter of its own: the rank, and the op's number there."""
        self._ends: list[dict[tuple[int, int | None], tuple[int, int]]] = [{} for _ in range(table.ranks)]

    def joins(self, group: int, rank: int) -> int:
        """The counter of the collectives of a group that a member joins."""
        if (group, rank) not in self.members:
            self.members[group, rank] = len(self.wakes)
            self.wakes.append(tuple(other for other in self.table.groups[group] if other != rank))
        return self.members[group, rank]

    def ends(self, rank: int, key: int, peer: int | None) -> tuple[int, int]:
        """The counters of a message's own side and of the other side; ``NEVER`` if there is no other rank."""
        found = self._ends[rank].get((key, peer))
        if found is None:
            found = self._ends[rank][key, peer] = self._new_ends(rank, key, peer)
        return found

    def _new_ends(self, rank: int, key: int, peer: int | None) -> tuple[int, int]:
        other = self.table.neighbour(key) if peer is None else peer
        if other is None or other == rank or not 0 <= other < self.table.ranks:
            return NEVER, NEVER
        sends = IS_SEND[key % WIDTH]
        pair = (rank, other) if sends else (other, rank)
        if pair not in self.pairs:
            self.pairs[pair] = len(self.wakes)
            self.wakes += ((pair[1],), (pair[0],))
        counter = self.pairs[pair]
        return (counter, counter + 1) if sends else (counter + 1, counter)

    def other_side(self, counter: int) -> int:
        """For the counter of a pair's sends that of its receives, and the other way round."""
        return counter + 1 if counter in self.pairs.values() else counter - 1

    def start(self, model: Model) -> list[int]:
        """The counters at the start.  Those of receives, which make room for sends, start at the buffer's capacity."""
        counts = [0] * len(self.wakes)
        counts[BUFFER] = model.capacity
        for send in self.pairs.values():
            counts[send + 1] = model.capacity
        return counts

    def lose(self, rank: int, number: int) -> int:
        """A new counter for a send that no other rank receives."""
        self.astray[len(self.wakes)] = rank, number
        self.wakes.append(())
        return len(self.wakes) - 1


def posts(counters: Counters) -> dict[int, list[tuple[int, int]]]:
    """For each counter what increases it, in order: ranks, and numbers of ops there.

    ``NEVER`` has the messages that no other rank can match.
    """
    found: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    groups = counters.table.groups
    for rank, row in counters.table.rows():
        for number, key in enumerate(row.keys):
            peer = row.peers.get(number)
            if IS_MESSAGE[key % WIDTH]:
                found[counters.ends(rank, key, peer)[0]].append((rank, number))
            elif not IS_COMPUTE[key % WIDTH] and peer is not None and rank in groups[peer]:
                found[counters.joins(peer, rank)].append((rank, number))
    return found


def threads_of(table: Table, *, by_use: bool) -> tuple[Counters, list[Thread]]:
    """The steps of every rank; those of ranks that wait where they post are kept, for the other models of that kind."""
    key = "threads by use" if by_use else "threads"
    if key not in table.derived:
        counters = Counters(table)
        made = counters, [thread(counters, rank, by_use=by_use) for rank in range(table.ranks)]
        if by_use:
            return made
        table.derived[key] = made
    kept: tuple[Counters, list[Thread]] = table.derived[key]
    return kept


def thread(counters: Counters, rank: int, *, by_use: bool, with_ops: bool = False) -> Thread:
    """The steps of a rank that waits for receives where it uses them, or else for each message slot."""
    made = Thread(ops=[] if with_ops else None)
    (_by_use if by_use else _by_slot)(counters, rank, counters.table.row(rank), made)
    return made


def _by_slot(counters: Counters, rank: int, row: Row, made: Thread) -> None:
    """A rank that waits for each message slot and each collective where it posts them."""
    keys, peers, posts, waits, until = row.keys, row.peers, made.posts, made.waits, made.until
    posted: dict[int, int] = {}
    ends: dict[int, tuple[int, int]] = {}
    for start, end in row.slots():
        if IS_COMPUTE[keys[start] % WIDTH]:
            continue
        for number in range(start, end):
            key = keys[number]
            if key in ends and number not in peers:
                own, other = ends[key]
            elif not IS_MESSAGE[key % WIDTH]:
                _join(counters, rank, number, peers.get(number), posted, made)
                continue
            else:
                own, other = counters.ends(rank, key, peers.get(number))
                if own == NEVER:
                    if IS_SEND[key % WIDTH]:
                        posts.append(counters.lose(rank, number))
                    made.wait(BUFFER if IS_SEND[key % WIDTH] else NEVER, 1, number)
                    continue
                if number not in peers:
                    ends[key] = own, other
            posted[own] = nth = posted.get(own, 0) + 1
            posts.append(own)
            waits.append(other)
            until.append(nth)
            if made.ops is not None:
                made.ops.append(number)
        made.post_ends.append(len(posts))
        made.wait_ends.append(len(waits))


def _join(counters: Counters, rank: int, number: int, group: int | None, posted: dict[int, int], made: Thread) -> None:
    """A collective waits until every member has joined as many of its group."""
    members = () if group is None else counters.table.groups[group]
    if group is None or rank not in members:
        return
    own = counters.joins(group, rank)
    posted[own] = posted.get(own, 0) + 1
    made.posts.append(own)
    for member in members:
        if member != rank:
            made.wait(counters.joins(group, member), posted[own], number)


def _by_use(counters: Counters, rank: int, row: Row, made: Thread) -> None:
    """A rank that waits for a receive at the compute that needs it, and for all its messages at its end."""
    keys, mbs, peers, posts, waits, until = row.keys, row.mbs, row.peers, made.posts, made.waits, made.until
    receives = counters.table.receives
    posted: dict[int, int] = {}
    opposite: dict[int, int] = {}
    ends: dict[int, tuple[int, int]] = {}
    brought: dict[int, dict[int, int]] = {}  # by key of a receive, microbatch: how many sends, and their counter

    def wait_for_all(op: int) -> None:
        for own, other in opposite.items():
            made.wait(other, posted[own], op)

    for start, end in row.slots():
        if IS_COMPUTE[keys[start] % WIDTH]:
            for number in range(start, end):
                for receive in receives[keys[number]]:
                    arrivals = brought.get(receive)
                    arrival = None if arrivals is None else arrivals.get(mbs[number])
                    if arrival is not None:
                        waits.append(arrival & _COUNTER)
                        until.append(arrival >> _BITS)
                        if made.ops is not None:
                            made.ops.append(number)
            continue
        collective = not IS_MESSAGE[keys[start] % WIDTH]
        if collective:
            wait_for_all(start)
        made.end_step()
        for number in range(start, end):
            if collective:
                _join(counters, rank, number, peers.get(number), posted, made)
                continue
            key = keys[number]
            known = None if number in peers else ends.get(key)
            if known is None:
                known = counters.ends(rank, key, peers.get(number))
                opposite[known[0]] = known[1]
                if number not in peers:
                    ends[key] = known
                if not IS_SEND[key % WIDTH]:
                    brought.setdefault(key, {})
            own, other = known
            posted[own] = nth = posted.get(own, 0) + 1
            if own != NEVER:
                posts.append(own)
            if key in brought:
                brought[key].setdefault(mbs[number], nth << _BITS | other)
    wait_for_all(AT_END)
    made.end_step()
