"""The replicas of a stage on two lanes: whether they are the same module, are summed, and are updated alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.phrases import names_of
from dualpipe.record.plain.gradients import equal
from dualpipe.record.plain.names import unique
from dualpipe.schedule import Chunk, Lane, Task


def differences(
    chunks: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
    reduced: Callable[[ChunkComparison], str] = lambda each: "",
) -> Iterator[str]:
    """What is wrong with the replicas of each stage before the optimizer's step, one sentence each.

    ``reduced`` gives the collective that sums the gradients of a chunk, and its line, if there is one.
    """
    yield from _unsummed(chunks, files, reduced)
    numbered: dict[int, str] = {}
    for stage, both in _pairs(chunks, files):
        yield from _unlike(stage, both, files, forwards)
        if found := _numbered_apart(both, files, forwards):
            numbered[stage] = found
    if numbered:
        first = min(numbered)
        what = f"at stage {first}, {numbered[first]}" if len(numbered) > 1 else numbered[first]
        yield (
            f"the replicas of {_stages(sorted(numbered))} number their layers differently: {what}. "
            "Is the mirror chunk numbered as if it were a stage of the rank's own number?"
        )


def updates(
    chunks: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
) -> Iterator[str]:
    """What the optimizer's step has made different between replicas whose gradients were summed."""
    for stage, both in _pairs(chunks, files):
        if all(files[each.rank].get("by_optimizer") and each.summed is not False for each in both):
            yield from _updated_apart(stage, both, files, forwards)


def _pairs(
    chunks: Sequence[ChunkComparison], files: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[int, list[ChunkComparison]]]:
    """The stages with their replicas on both lanes, if these have made their plain runs."""
    by_stage: dict[int, list[ChunkComparison]] = {}
    for each in chunks:
        by_stage.setdefault(each.chunk.stage, []).append(each)
    for stage, both in by_stage.items():
        if len(both) == len(Lane) and not any("error" in files[each.rank] for each in both):
            yield stage, both


def _unsummed(
    chunks: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    reduced: Callable[[ChunkComparison], str],
) -> Iterator[str]:
    """The stages whose replicas were not summed, though the optimizer updates them, beside those that were."""
    by_optimizer = [each for each in chunks if files[each.rank].get("by_optimizer")]
    apart = sorted({each.chunk.stage for each in by_optimizer if each.summed is False})
    if not apart:
        return
    summed = [each for each in by_optimizer if each.summed and each.chunk.stage not in apart]
    what = f"the replicas of {_stages(apart)} were not summed before the optimizer's step"
    if not summed:
        yield f"{what}: each would be updated by its own gradient. Are the gradients finalized at all?"
        return
    at = next(filter(None, map(reduced, summed)), "")
    those = f"those of {_stages(sorted({each.chunk.stage for each in summed}))} were{f' ({at})' if at else ''}"
    of_rank = {rank: {each.summed for each in chunks if each.rank == rank} for rank in {each.rank for each in chunks}}
    one_each = all(found == {True, False} for found in of_rank.values())
    why = "Is only one chunk of each rank finalized?" if one_each else "Are all chunks of each rank finalized?"
    yield f"{what}, and {those}. {why}"


def _stages(numbers: Sequence[int]) -> str:
    return f"stage{'s' * (len(numbers) > 1)} {' '.join(map(str, numbers))}"


def _weights(each: ChunkComparison, forwards: Mapping[Task, Mapping[str, Any]]) -> list[int]:
    """The numbers of the parameters of a chunk."""
    return sorted({n for t, found in forwards.items() if t.chunk == each.chunk for n in found.get("weights", {})})


def _named(
    each: ChunkComparison, of: str, files: Mapping[int, Mapping[str, Any]], forwards: Mapping[Task, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The weights of a chunk by name: those of before the step (``weights``) or of after it (``changed``)."""
    file = files[each.rank]
    kept = file.get(of) or {}
    names = unique(_weights(each, forwards), file["names"])
    return {name: kept[number] for number, name in names.items() if number in kept}


def _unlike(
    stage: int,
    both: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
) -> Iterator[str]:
    """What is different between the modules of two replicas before the step: names, weights."""
    one, other = (_named(each, "weights", files, forwards) for each in both)
    if not one or not other:
        return
    ranks = [each.rank for each in both]
    if lone := sorted(one.keys() ^ other.keys()):
        holder = ranks[0] if lone[0] in one else ranks[1]
        yield (
            f"the replicas of stage {stage} have other parameters: {names_of(lone)} only on rank {holder}. Is the "
            "chunk built for the rank's number instead of its stage's?"
        )
        return
    if apart := [name for name in one if not equal(one[name], other[name])]:
        yield (
            f"the replicas of stage {stage} on ranks {ranks[0]} and {ranks[1]} have different weights before the step: "
            f"{names_of(apart)}. Are the weights of one broadcast to the other at the start?"
        )


def _numbered_apart(
    both: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
) -> str:
    """A number of a layer that two replicas with the same parameters have different, and how many more there are."""
    named = [_named(each, "weights", files, forwards).keys() for each in both]
    one, other = (_layers(each.chunk, files[each.rank], forwards) for each in both)
    unlike = sorted(name for name in one if other.get(name, one[name]) != one[name])
    if not unlike or named[0] != named[1]:
        return ""
    more = f", and {len(unlike) - 1} more" if len(unlike) > 1 else ""
    name, ranks = unlike[0], [each.rank for each in both]
    return f"{name} is {one[name]} on rank {ranks[0]} and {other[name]} on rank {ranks[1]}{more}"


def _layers(chunk: Chunk, file: Mapping[str, Any], forwards: Mapping[Task, Mapping[str, Any]]) -> Mapping[str, int]:
    """The numbers of layers in the modules of a chunk, by attribute."""
    found = next((each for task, each in sorted(forwards.items()) if task.chunk == chunk and "layers" in each), {})
    numbers: Mapping[str, int] = found.get("layers", {})
    return numbers


def _updated_apart(
    stage: int,
    both: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
) -> Iterator[str]:
    """The weights that were equal before the step and are not after it."""
    before = [_named(each, "weights", files, forwards) for each in both]
    after = [_named(each, "changed", files, forwards) for each in both]
    if not all(after):
        return
    apart = [
        name
        for name in before[0]
        if equal(before[0][name], before[1].get(name)) and not equal(after[0].get(name), after[1].get(name))
    ]
    if apart:
        still = [
            each.rank
            for each, old, new in zip(both, before, after, strict=True)
            if all(equal(old[name], new[name]) for name in apart)
        ]
        which = f": that on rank {still[0]} is not updated" if len(still) == 1 else ""
        yield (
            f"the replicas of stage {stage} on ranks {both[0].rank} and {both[1].rank} have different weights after "
            f"the optimizer's step: {names_of(apart)}{which}"
        )
