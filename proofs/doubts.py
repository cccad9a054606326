"""Which names of a recorded schedule may be wrong because of a fault that a check has found.

A recording names received messages by what uses them.  Two faults make such names wrong, and then the stories of other
checks mislead, since they rest on the names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dualpipe.schedule import RECEIVES, Schedule
from proofs.buffers_search import in_shared_memory
from proofs.channels import surplus_receive
from proofs.findings import Finding, Mismatch, TouchedInFlight


def doubts(schedule: Schedule, findings: Mapping[str, Finding | None]) -> Iterator[str]:
    """A sentence for each cause of wrong names; ``findings`` are those of the checks."""
    if not schedule.observed:
        return
    found, mismatch = findings.get("buffers"), findings.get("messages")
    if isinstance(found, TouchedInFlight) and found.is_shared:
        ranks = [rank for rank in range(schedule.ranks) if in_shared_memory(schedule, rank)]
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"each of the ranks {', '.join(map(str, ranks))}"
        yield (
            "names of messages may be wrong, and with them what the other checks say: a receive is named by what uses "
            f"its memory, and {who} had two receives in flight into the same memory at a time (see buffers)"
        )
    elif isinstance(mismatch, Mismatch) and mismatch.second.op.kind in RECEIVES:
        rank, peer = mismatch.second.rank, mismatch.first.rank
        surplus = surplus_receive(schedule, rank, peer)
        if surplus is not None:
            at = schedule.observed.place(surplus)
            yield (
                f"rank {rank} posts one receive from rank {peer} too many, probably {surplus.op} in slot {surplus.slot}"
                f"{f', at {at}' if at else ''}: the names of the messages that follow on this channel may be shifted "
                "by one, and with them what the other checks say"
            )
