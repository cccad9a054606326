"""Which backwards have no W, because parameters never got the gradients that they were owed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dualpipe.record.events import Forward, Owed, RankLog


def lacking(log: RankLog) -> Mapping[int, tuple[Owed, ...]]:
    """By forward, the parameters whose gradient was certainly never computed in the step, so that there is no W.

    The engine reached such a parameter without a gradient, and nothing added one later.  A parameter that the engine
    did not reach, or reached with zeros, may be used without a gradient; but not if it got one later, from outside of
    the backward, for another forward of the rank.  Nor one that the engine did not reach, if for another forward the
    program itself set or changed its gradient during the backward.
    """
    late = {number for forward in log.forwards.values() for number in forward.paid}
    fed = {number for forward in log.forwards.values() for number in forward.fed}

    def is_certain(at: int, owed: Owed) -> bool:
        return owed.how == "none" or at in late or (owed.how == "unseen" and at in fed)

    found = {
        number: tuple(owed for at, owed in _unpaid(forward) if is_certain(at, owed))
        for number, forward in log.forwards.items()
    }
    return {number: owed for number, owed in found.items() if owed}


def uncertain(log: RankLog) -> Mapping[int, tuple[Owed, ...]]:
    """By forward, the parameters of which it could not be determined whether they lack a gradient.

    Those that the forward reads and the engine did not reach, and those with zeros if all that it reached had zeros.  A
    forward of which no weight gradient was computed has no W, which is certain.
    """
    certain = lacking(log)
    found = {}
    for number, forward in log.forwards.items():
        if not forward.weights and not forward.requested_at:
            continue
        left = [owed for _, owed in _unpaid(forward) if owed not in certain.get(number, ())]
        found[number] = tuple(owed for owed in left if owed.how in ("unseen", "all zero"))
    return {number: owed for number, owed in found.items() if owed}


def _unpaid(forward: Forward) -> Iterator[tuple[int, Owed]]:
    return ((number, owed) for number, owed in forward.owed.items() if number not in forward.paid)
