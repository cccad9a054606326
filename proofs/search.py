"""Plain search, the first of the two methods: one pass over the programs for each check, in linear time.

``complete`` counts, ``order`` keeps a set of the ops that each rank has done, ``messages`` pairs the sends of an
ordered pair of ranks with its receives and the collectives of a group's members with each other, ``accumulation``
remembers the last B and W of each stage.  All of them read the numbers of ``proofs.table``.  ``deadlock`` is in
``proofs.deadlock_search`` and ``memory`` in ``proofs.memory``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple, assert_never

from dualpipe.schedule import Kind, Op, Placed, Schedule
from proofs.findings import (
    Empty,
    Finding,
    LeftOver,
    Mismatch,
    Missing,
    NoPeer,
    NotMember,
    NotNeighbour,
    OutOfOrder,
    Repeated,
    SentTwice,
    Stray,
    TooEarly,
)
from proofs.table import IS_COMPUTE, IS_MESSAGE, IS_RECEIVE, IS_SEND, KINDS, WIDTH, B, F, Row, Table, W, table_of
from proofs.verdict import Proved, Refuted, Verdict

COMPUTES = (F, B, W)
RG = KINDS.index(Kind.RG)
IS_COLLECTIVE = tuple(not (compute or message) for compute, message in zip(IS_COMPUTE, IS_MESSAGE, strict=True))
_PairFault = Mismatch | LeftOver | SentTwice
"""The faults of the messages of one ordered pair of ranks."""


def complete(schedule: Schedule) -> Verdict:
    """Every stage runs F, B and W exactly once for each microbatch of its lane.

    The microbatches of a lane are 0 to the largest that any op names, messages included, so a receive for a
    microbatch that no stage runs is found here too.  The work grows with the ops and not with that number.
    """
    return _verdict(_incomplete(table_of(schedule)))


def _incomplete(table: Table) -> Finding | None:
    keys = len(table.chunks) * WIDTH
    computes = [IS_COMPUTE[key % WIDTH] for key in range(keys)]
    missing: dict[tuple[int, int], int] = {}  # by chunk, position in COMPUTES: the first microbatch that does not run
    empty = True
    for rank, row in table.rows():
        ran: dict[int, set[int]] = {chunk * WIDTH + kind: set() for chunk in table.held_by[rank] for kind in COMPUTES}
        for number, (key, mb) in enumerate(zip(row.keys, row.mbs, strict=True)):
            if computes[key]:
                done = ran.get(key)
                if done is None or mb in done:
                    return _not_its_turn(table, rank, number)
                done.add(mb)
        empty = empty and not any(ran.values())
        for chunk in table.held_by[rank]:
            for position, kind in enumerate(COMPUTES):
                done = ran[chunk * WIDTH + kind]
                if len(done) < table.microbatches[chunk]:
                    missing[chunk, position] = next(mb for mb in count() if mb not in done)
    if empty:
        return Empty()
    if missing:
        chunk, position = min(missing)
        op = table.op(chunk * WIDTH + COMPUTES[position], missing[chunk, position])
        return Missing(op, table.holder[chunk], table.microbatches[chunk] - 1)
    return None


def _not_its_turn(table: Table, rank: int, number: int) -> Stray | Repeated:
    """A compute on a rank that does not hold its stage, or one that has run before."""
    row, place = table.row(rank), table.placed(rank, number)
    key, mb = row.keys[number], row.mbs[number]
    holder = table.holder[key // WIDTH]
    if holder != rank:
        return Stray(place, holder)
    first = next(at for at, of in enumerate(zip(row.keys, row.mbs, strict=True)) if of == (key, mb))
    return Repeated(table.placed(rank, first), place)


def order(schedule: Schedule) -> Verdict:
    """Every op runs after what it needs on its own rank; ops of one slot run in the order written.

    The last reduction of a stage's gradients needs every W of that stage that its rank runs.
    """
    table = table_of(schedule)
    needs = [() if IS_RECEIVE[key % WIDTH] else need for key, need in enumerate(table.needs)]
    early: list[tuple[Placed, Op]] = []
    for rank, row in table.rows():  # a receive needs another rank's send, which `messages` and `deadlock` check
        early += _first_early(table, rank, row, needs)
    for rank, row in table.rows():
        early += _reduced_early(table, rank, row)
    if not early:
        return Proved()
    placed, need = min(early, key=lambda found: (found[0].slot, found[0].rank))
    row, key = table.row(placed.rank), table.key(need)
    later = (at for at, of in enumerate(zip(row.keys, row.mbs, strict=True)) if of == (key, need.mb))
    found = next(later, None)
    return Refuted(TooEarly(placed, need, None if found is None else table.placed(placed.rank, found)))


def _first_early(table: Table, rank: int, row: Row, needs: Sequence[tuple[int, ...]]) -> Iterator[tuple[Placed, Op]]:
    """The first op of a rank that runs before something that it needs, with the first such need."""
    done: defaultdict[int, set[int]] = defaultdict(set)
    for number, (key, mb) in enumerate(zip(row.keys, row.mbs, strict=True)):
        for need in needs[key]:
            if mb not in done[need]:
                yield table.placed(rank, number), table.op(need, mb)
                return
        done[key].add(mb)


def _reduced_early(table: Table, rank: int, row: Row) -> Iterator[tuple[Placed, Op]]:
    """The last reduction of every stage on a rank with the first W after it, if there is one."""
    last: dict[int, tuple[int, int | None]] = {}
    for number, key in enumerate(row.keys):
        kind = key % WIDTH
        if kind == RG:
            last[key // WIDTH] = number, None
        elif kind == W and last and last.get(key // WIDTH, (0, 0))[1] is None:
            last[key // WIDTH] = last[key // WIDTH][0], number
    for reduction, late in last.values():
        if late is not None:
            yield table.placed(rank, reduction), table.placed(rank, late).op


class _Side(NamedTuple):
    """The sends, or the receives, between an ordered pair of ranks: each op's number on its rank, and its content."""

    rank: int
    numbers: list[int]
    contents: list[int]


def _side(rank: int) -> _Side:
    return _Side(rank, [], [])


def messages(schedule: Schedule) -> Verdict:
    """Peers are the lane's neighbours, and the k-th send of every ordered pair is what its k-th receive expects.

    The k-th collective of a group is the same for all its members.
    """
    table = table_of(schedule)
    sides: dict[tuple[int, int, bool], _Side] = {}  # of pairs with a rank that is still to come
    found: list[tuple[tuple[int, int], _PairFault]] = []
    carries = [_content(table, key) for key in range(len(table.chunks) * WIDTH)]
    most = 1 + max(table.microbatches)
    for rank, row in table.rows():
        known: dict[int, _Side] = {}
        for number, (key, mb) in enumerate(zip(row.keys, row.mbs, strict=True)):
            content = carries[key]
            if content is None:
                continue
            if key not in known or number in row.peers:
                wrong = _wrong_peer(table, rank, number)
                if wrong is not None:
                    return _verdict(wrong)
                neighbour, sends = table.neighbour(key), IS_SEND[key % WIDTH]
                assert neighbour is not None
                pair = (rank, neighbour, True) if sends else (neighbour, rank, False)
                known[key] = sides.setdefault(pair, _side(rank))
            side = known[key]
            side.numbers.append(number)
            side.contents.append(content * most + mb)
        for one, other in {ends[:2] for ends in sides if max(ends[:2]) <= rank}:
            send, receive = sides.pop((one, other, True), _side(one)), sides.pop((one, other, False), _side(other))
            found += (((one, other), fault) for fault in _faults(table, send, receive))
    found.sort(key=lambda of: of[0])
    urgent = min((fault for _, fault in found), key=_urgency, default=None)
    return _verdict(urgent or _wrong_collective(table))


def _content(table: Table, key: int) -> int | None:
    """A number for the stage boundary and the direction of a message, without its microbatch; ``None`` for other ops.

    It is the key of the message's send.
    """
    if not IS_MESSAGE[key % WIDTH]:
        return None
    if IS_SEND[key % WIDTH]:
        return key
    sends = table.needs[key]
    return sends[0] if sends else -1 - key


def _wrong_collective(table: Table) -> NotMember | Mismatch | LeftOver | None:
    """The first collective that is wrong: its rank is not a member, two members disagree, or a member never joins."""
    joins: list[dict[int, list[Placed]]] = [{rank: [] for rank in members} for members in table.groups]
    for rank, row in table.rows() if table.groups else ():
        for number, group in row.peers.items():
            if IS_COLLECTIVE[row.keys[number] % WIDTH]:
                placed, own = table.placed(rank, number), joins[group].get(rank)
                if own is None:
                    return NotMember(placed, table.groups[group])
                own.append(placed)
    for by_rank in joins:
        first, *others = by_rank.values()
        for other in others:
            for nth, (one, two) in enumerate(zip(first, other, strict=False)):
                if _together(one.op) != _together(two.op):
                    return Mismatch(one, two, nth)
    for by_rank in joins:
        least = min(by_rank, key=lambda rank: len(by_rank[rank]))
        joined = len(by_rank[least])
        for own in by_rank.values():
            if len(own) > joined:
                return LeftOver(own[joined], least, joined, joined)
    return None


def _together(op: Op) -> tuple[Kind, int | None]:
    """What the members of a group must agree on: the kind, and except for an all-reduce the stage."""
    return op.kind, None if op.kind is Kind.AR else op.stage


def _wrong_peer(table: Table, rank: int, number: int) -> Finding | None:
    row = table.row(rank)
    key = row.keys[number]
    neighbour, holder = table.neighbour(key), table.holder[key // WIDTH]
    peer = row.peers.get(number, neighbour)
    if peer is None or neighbour is None or not 0 <= peer < table.ranks or peer == rank:
        return NoPeer(table.placed(rank, number), peer, table.ranks, holder, neighbour)
    if peer != neighbour or rank != holder:
        return NotNeighbour(table.placed(rank, number), peer, holder, neighbour)
    return None


def _faults(table: Table, send: _Side, receive: _Side) -> Iterator[_PairFault]:
    """The first mismatch of an ordered pair, its first message left over, and its first repetition."""
    both = min(len(send.numbers), len(receive.numbers))
    if send.contents[:both] != receive.contents[:both]:
        nth = next(n for n in range(both) if send.contents[n] != receive.contents[n])
        one, other = (table.placed(side.rank, side.numbers[nth]) for side in (send, receive))
        yield Mismatch(one, other, nth)
    for side, opposite in ((send, receive), (receive, send)):
        if len(side.numbers) > both:
            yield LeftOver(table.placed(side.rank, side.numbers[both]), opposite.rank, both, both)
    if len(set(send.contents)) < len(send.contents):
        seen: dict[int, int] = {}
        for number, content in zip(send.numbers, send.contents, strict=True):
            first = seen.setdefault(content, number)
            if first != number:
                yield SentTwice(table.placed(send.rank, first), table.placed(send.rank, number))
                break


def _urgency(fault: _PairFault) -> tuple[int, int]:
    """Mismatches first, since the reader can act on them; then by how early the fault shows."""
    match fault:
        case Mismatch(send, receive, _):
            return 0, max(send.slot, receive.slot)
        case LeftOver(place, _, _, _):
            return 1, place.slot
        case SentTwice(_, second):
            return 2, second.slot
        case _:
            assert_never(fault)


def accumulation(schedule: Schedule) -> Verdict:
    """At each stage and lane the B run in microbatch order, and the W too.

    W adds the gradients of linear layers, B those of all other parameters.
    """
    table = table_of(schedule)
    adds = [key % WIDTH in (B, W) for key in range(len(table.chunks) * WIDTH)]
    for rank, row in table.rows():
        last = [-1] * len(adds)
        for number, (key, mb) in enumerate(zip(row.keys, row.mbs, strict=True)):
            if adds[key]:
                if mb < last[key]:
                    before = max(at for at in range(number) if row.keys[at] == key)
                    return Refuted(OutOfOrder(table.placed(rank, before), table.placed(rank, number)))
                last[key] = mb
    return Proved()


def _verdict(found: Finding | None) -> Verdict:
    return Proved() if found is None else Refuted(found)
