"""Theorem ``messages``: on every ordered pair of ranks the k-th send is the k-th receive's payload, none left over."""

from __future__ import annotations

from collections.abc import Iterator

from proofs.theorems.constraint import NEVER, equal
from proofs.theorems.family import Family
from proofs.theorems.obligation import Link, Obligation
from proofs.theorems.symbolic import Place, exactly


def messages(family: Family) -> Iterator[Obligation]:
    for link in family.links:
        sends, receives = exactly(*link.meets), exactly(*link.meets.values())
        for send, receive in meetings(link):
            matched = link.meets[send.action] == receive.action
            yield Obligation(
                link,
                f"{send} meets {receive}",
                (*send.guard, *receive.guard, equal(send.before(sends), receive.before(receives))),
                (equal(send.mb, receive.mb),) if matched else (NEVER,),
                (str(send.action), send.mb, str(receive.action), receive.mb),
            )
        sent, received = link.sender.total(sends), link.receiver.total(receives)
        yield Obligation(
            link, f"none is left over, {link.name}", (), (equal(sent, received),), ("total", sent, received)
        )


def meetings(link: Link) -> Iterator[tuple[Place, Place]]:
    """Every send and receive that some size may bring together on the link."""
    receives = link.receiver.places(exactly(*link.meets.values()), "j")
    for send in link.sender.places(exactly(*link.meets), "i"):
        for receive in receives:
            yield send, receive
