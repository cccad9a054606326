"""The replicas of a stage on two lanes: whether they are the same module, are summed, and are updated alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.plain.gradients import equal
from dualpipe.schedule import Chunk, Lane, Task

_MOST_NAMES = 3


def differences(
    chunks: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
) -> Iterator[str]:
    """What is wrong with the replicas of each stage, one sentence each."""
    by_stage: dict[int, list[ChunkComparison]] = {}
    for each in chunks:
        by_stage.setdefault(each.chunk.stage, []).append(each)
    for stage, both in by_stage.items():
        if len(both) < len(Lane) or any("error" in files[each.rank] for each in both):
            continue
        ranks = " and ".join(f"{each.rank}" for each in both)
        yield from _unlike(stage, both, files, forwards)
        updated = all(files[each.rank].get("by_optimizer") for each in both)
        if updated and any(each.summed is False for each in both):
            yield (
                f"the replicas of stage {stage} on ranks {ranks} were not summed before the optimizer's step: each "
                "would be updated by its own gradient"
            )
        elif updated:
            yield from _updated_apart(stage, both, files, forwards)


def _weights(each: ChunkComparison, forwards: Mapping[Task, Mapping[str, Any]]) -> list[int]:
    """The numbers of the parameters of a chunk."""
    return sorted({n for t, found in forwards.items() if t.chunk == each.chunk for n in found.get("weights", {})})


def _named(
    each: ChunkComparison, of: str, files: Mapping[int, Mapping[str, Any]], forwards: Mapping[Task, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """The weights of a chunk by name: those of before the step (``weights``) or of after it (``changed``)."""
    file = files[each.rank]
    kept = file.get(of) or {}
    return {file["names"][number]: kept[number] for number in _weights(each, forwards) if number in kept}


def _unlike(
    stage: int,
    both: Sequence[ChunkComparison],
    files: Mapping[int, Mapping[str, Any]],
    forwards: Mapping[Task, Mapping[str, Any]],
) -> Iterator[str]:
    """What is different between the modules of two replicas before the step: names, weights, numbers of layers."""
    one, other = (_named(each, "weights", files, forwards) for each in both)
    if not one or not other:
        return
    ranks = [each.rank for each in both]
    if lone := sorted(one.keys() ^ other.keys()):
        holder = ranks[0] if lone[0] in one else ranks[1]
        yield (
            f"the replicas of stage {stage} have other parameters: {shown(lone)} only on rank {holder}. Is the chunk "
            "built for the rank's number instead of its stage's?"
        )
        return
    if apart := [name for name in one if not equal(one[name], other[name])]:
        yield (
            f"the replicas of stage {stage} on ranks {ranks[0]} and {ranks[1]} have different weights before the step: "
            f"{shown(apart)}. Are the weights of one broadcast to the other at the start?"
        )
    layers = [_layers(each.chunk, files[each.rank], forwards) for each in both]
    unlike = sorted(name for name in layers[0] if layers[1].get(name, layers[0][name]) != layers[0][name])
    if unlike:
        name = unlike[0]
        yield (
            f"the replicas of stage {stage} number their layers differently: {name} is {layers[0][name]} on rank "
            f"{ranks[0]} and {layers[1][name]} on rank {ranks[1]}"
            f"{f', and {len(unlike) - 1} more' if len(unlike) > 1 else ''}. Is the mirror chunk numbered as if it were "
            "a stage of the rank's own number?"
        )


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
            f"the optimizer's step: {shown(apart)}{which}"
        )


def shown(names: Sequence[str]) -> str:
    """The first of several names, and how many there are more."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
