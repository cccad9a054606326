"""What was seen in a program that a schedule cannot say: notes for a reader, and caveats beside a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from dualpipe.record.events import Doubt, Owner, RankLog
from dualpipe.record.names import Lineage

TOLD = {
    "detached": (
        "the module called at {at} takes a detached tensor of {op}, which asks for no gradient; whether it is a stage "
        "of its own could not be determined, and it is written as part of that forward",
        "the stage boundary of {count} calls could not be determined",
    ),
    "called again": (
        "the module called at {at} was called before on the same tensors for {op}; the file has that forward once",
        "{count} forwards ran more than once and are written once",
    ),
    "run again": (
        "the engine ran at {at} from a tensor of {op} from which it had run before; the file has that backward once",
        "{count} backwards ran more than once and are written once",
    ),
    "several groups": (
        "it sends or receives at {at} in another process group of the same ranks; a schedule file has one order of "
        "messages between two ranks",
        "whether messages of different process groups overtake each other could not be determined",
    ),
}
"""By the kind of doubt: the note on a place of the program, and what it means for a verdict."""


def describe_doubts(logs: Sequence[RankLog], lineage: Lineage) -> list[str]:
    """The notes, one for each rank, kind and line of the program."""
    places: dict[tuple[int, str, str], list[Doubt]] = {}
    for rank, doubt in _of_pipeline(logs, lineage):
        places.setdefault((rank, doubt.what, doubt.at), []).append(doubt)
    notes = []
    for (rank, what, at), doubts in places.items():
        name = lineage.names.get(Owner(rank, doubts[0].forward))
        op = "" if name is None else f"{name.stage}F{name.mb}{name.lane}"
        times = f" ({len(doubts)} times)" if len(doubts) > 1 else ""
        notes.append(f"rank {rank}: {TOLD[what][0].format(at=at, op=op)}{times}")
    return notes


def caveats_of(logs: Sequence[RankLog], lineage: Lineage) -> Iterator[str]:
    """Why a proof of the schedule would be none of the whole program."""
    counts = Counter(doubt.what for _, doubt in _of_pipeline(logs, lineage))
    return (TOLD[what][1].format(count=count) for what, count in counts.items())


def _of_pipeline(logs: Sequence[RankLog], lineage: Lineage) -> Iterator[tuple[int, Doubt]]:
    """The doubts about messages, and about forwards that have a name, with their ranks."""
    for log in logs:
        for doubt in log.doubts:
            if doubt.what == "several groups" or Owner(log.rank, log.find(doubt.forward)) in lineage.names:
                yield log.rank, doubt
