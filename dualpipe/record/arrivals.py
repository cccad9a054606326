"""Finds forwards and backwards whose input no torch operator computed; it may be from another stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dualpipe.record.events import Arrival, Collective, Doubt, RankLog


def note_arrivals(logs: Sequence[RankLog], everything: Sequence[RankLog]) -> None:
    """Add a doubt to the ``logs`` of one training step for every forward whose input may be an activation.

    ``everything`` are the logs of all steps.  The input may be an activation if it was made from NumPy, a list or the
    like after an activation had left torch on that rank, or if it comes from a collective or a pickled object into
    which some rank had put an activation.
    """
    pickled = any("pickle" in log.left for log in everything)
    for log in logs:
        own = everything[log.rank]
        for forward, number, at, step, _ in own.taken:
            arrival = own.arrivals[number]
            if own.find(forward) in log.forwards and _may_carry(arrival, own, everything, pickled):
                what = {"outside": "outside", "object": "object", "collective": "by a collective"}[arrival.how]
                doubt = Doubt(what, own.find(forward), at, step)
                if doubt not in log.doubts:
                    log.doubts.append(doubt)


def _may_carry(arrival: Arrival, log: RankLog, everything: Sequence[RankLog], pickled: bool) -> bool:
    if arrival.collective is None:
        return arrival.how == "outside" or pickled
    return any(each.carries for each in _met(log.collectives[arrival.collective], everything))


def _met(one: Collective, logs: Sequence[RankLog]) -> Iterator[Collective]:
    """The collectives of the other members that meet this one: each member's k-th in its group.

    Members outside of the pipeline, as those of tensor parallelism, have no other stage of it.
    """

    def row(log: RankLog) -> list[Collective]:
        return [c for c in log.collectives.values() if (c.group_name, c.group) == (one.group_name, one.group)]

    nth = row(logs[one.id.rank]).index(one)
    for log in logs:
        if log.rank != one.id.rank and log.rank in one.group and len(met := row(log)) > nth:
            yield met[nth]
