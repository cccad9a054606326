"""Which microbatch a forward is of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from dualpipe.record.events import Forward, Owner
from dualpipe.record.names import Chunk, Name
from dualpipe.schedule import Lane


def number(
    forwards: Mapping[Owner, Forward],
    chunk_of: Mapping[Owner, Chunk],
    place: Mapping[Chunk, tuple[Lane, int]],
    chains: Sequence[Sequence[Chunk]],
    before: Mapping[Owner, Owner],
) -> tuple[dict[Owner, Name], list[str]]:
    """Microbatches: counted at stage 0, carried on from there; where the flow is broken, the place in order counts."""
    names: dict[Owner, Name] = {}
    notes: list[str] = []
    for chain in chains:
        for stage, chunk in enumerate(chain):
            lane, _ = place[chunk]
            own = sorted(owner for owner, c in chunk_of.items() if c == chunk)
            broken = []
            for count, owner in enumerate(own):
                if stage == 0:
                    names[owner] = Name(lane, stage, count)
                    continue
                origin = before.get(owner)
                known = names.get(origin) if origin is not None else None
                if known is None or origin is None or chunk_of.get(origin) != chain[stage - 1]:
                    broken.append(owner)
                else:
                    names[owner] = Name(lane, stage, known.mb)
            taken = {names[owner].mb for owner in own if owner in names}
            free = (mb for mb in range(len(own) + len(taken)) if mb not in taken)
            for owner in broken:
                names[owner] = Name(lane, stage, next(free))
                notes.append(
                    f"rank {owner.rank}: the forward at {forwards[owner].at} began from something else than "
                    f"stage {stage - 1}'s activation; it is named {stage}F{names[owner].mb}{lane} by its place in order"
                )
    return names, notes


def set_evaluations_aside(
    forwards: Mapping[Owner, Forward], chunk_of: Mapping[Owner, Chunk], names: Mapping[Owner, Name]
) -> tuple[dict[Owner, Name], list[str]]:
    """The names without the microbatches of an evaluation, which ran without gradients on stages that train besides.

    Where all forwards of a stage run without gradients, they are those of a program that computes them again later.
    """
    trains = {chunk for owner, chunk in chunk_of.items() if forwards[owner].grad}
    alone = {owner for owner in names if not forwards[owner].grad and not forwards[owner].behind}
    trained = {(n.lane, n.mb) for o, n in names.items() if o not in alone or chunk_of[o] not in trains}
    kept: dict[Lane, list[int]] = defaultdict(list)
    for lane, mb in sorted(trained):
        kept[lane].append(mb)
    left = {owner: n for owner, n in names.items() if (n.lane, n.mb) in trained}
    notes = []
    if len(left) < len(names):
        count = len({(n.lane, n.mb) for n in names.values()} - trained)
        notes.append(f"{count} microbatches ran without gradients, an evaluation, and are left out")
    places = Counter(forwards[owner].at for owner in alone & left.keys())
    notes += [f"{n} forwards at {at} ran without gradients and have no backward" for at, n in sorted(places.items())]
    return {o: Name(n.lane, n.stage, kept[n.lane].index(n.mb)) for o, n in left.items()}, notes
