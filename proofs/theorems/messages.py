"""Theorem ``messages``: on every ordered pair of ranks the k-th send is what the k-th receive expects; none is left."""

from __future__ import annotations

from collections.abc import Iterator

from proofs.theorems.constraint import NEVER, equal
from proofs.theorems.family import Family
from proofs.theorems.obligation import Obligation
from proofs.theorems.symbolic import exactly


def messages(family: Family) -> Iterator[Obligation]:
    for link in family.links:
        sends, receives = exactly(*link.matches), exactly(*link.matches.values())
        received = link.receiver.positions(receives, "j")
        for send in link.sender.positions(sends, "i"):
            for receive in received:
                fits = link.matches[send.action] == receive.action
                yield Obligation(
                    link,
                    f"{send} matches {receive}",
                    (*send.guard, *receive.guard, equal(send.before(sends), receive.before(receives))),
                    (equal(send.mb, receive.mb),) if fits else (NEVER,),
                    (str(send.action), send.mb, str(receive.action), receive.mb),
                )
        sent, got = link.sender.total(sends), link.receiver.total(receives)
        yield Obligation(link, f"none is left over, {link.name}", (), (equal(sent, got),), ("total", sent, got))
