"""The losses of each lane: how many backwards began from one, and what became of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from dualpipe.record.comparison import ChunkComparison, LossComparison, LossWeights
from dualpipe.record.events import ForwardId, RankLog
from dualpipe.schedule import Chunk, Lane, Task


def losses_of(
    files: Mapping[int, Mapping[str, Any]],
    logs: Sequence[RankLog],
    tasks: Mapping[ForwardId, Task],
    routes: Mapping[Lane, tuple[int, ...]],
    chunks: Sequence[ChunkComparison],
    weights: LossWeights,
) -> Iterator[LossComparison]:
    """The losses of every lane whose last rank ended its step.

    ``logs`` are those of the pipeline's ranks, ``weights`` those of the losses in the gradient.
    """
    for lane, route in routes.items():
        last = [id for id, task in tasks.items() if task.chunk == Chunk(lane, len(route) - 1)]
        file, log = files[route[-1]], logs[route[-1]]
        seen = set(file.get("seen", ()))
        computed = [id for id in last if logs[id.rank].forwards[logs[id.rank].find(id.number)].backward_began]
        if "error" in file:
            continue
        count = sum(logs[id.rank].find(id.number) in seen for id in computed) if file.get("by_optimizer") else None
        collected = not {logs[id.rank].find(id.number) for id in computed}.isdisjoint(file.get("collected", ()))
        numbers = [logs[id.rank].find(id.number) for id in computed]
        read = None if "read" not in file else len({*numbers} & {*file["read"]})
        end = next(each for each in chunks if each.chunk == Chunk(lane, len(route) - 1))
        divided = end.divided_by
        replicas = end.pipelines > 1 or (end.summed is True and divided == len(routes))  # it may be their number
        again = not replicas and _divided(file, numbers) == divided
        again = again or (len(last) == divided and weights.is_divided_twice(lane))
        twice = divided if divided > 1 and again and weights.reduction != "mean" else None
        yield LossComparison(
            lane,
            route[-1],
            len(last),
            len(computed),
            count,
            collected,
            read,
            twice,
            sent=_sent(log, numbers),
            dropped=file.get("dropped", ""),
        )


def _sent(log: RankLog, forwards: Collection[int]) -> str:
    """The first collective, outside of all modules, or message of a rank that has the results of these forwards."""
    for collective in log.collectives.values():
        if not collective.context and not {*forwards}.isdisjoint(collective.outputs):
            return f"{collective.name} at {collective.at}"
    for message in log.messages.values():
        if message.send and any(id.number in forwards for id in message.activation_of):
            return f"message to rank {message.peer} at {message.at}"
    return ""


def _divided(file: Mapping[str, Any], forwards: Sequence[int]) -> int:
    """By what whole number the program divides its losses before their backwards; 1 if that does not show.

    It shows where the program keeps or reads the loss itself as well as what it divided.
    """
    found: set[int] = set()
    for forward in forwards:
        root, values = file.get("roots", {}).get(forward), file.get("losses", {}).get(forward, ())
        ratios = [value / root for value in values if root]
        whole = {round(ratio) for ratio in ratios if ratio > 1.5 and abs(ratio - round(ratio)) < 1e-4 * ratio}
        if len(whole) != 1:
            return 1
        found |= whole
    return found.pop() if len(found) == 1 else 1
