"""The lanes as a user gives them or as they are guessed, where the messages of a run that failed do not show them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from dualpipe.record.events import Forward, ForwardId, Message, MessageId, ModuleId, RecordError
from dualpipe.schedule import DOWN, UP, Lane

LANE = re.compile(r"\s*[0-9]{1,9}(\.[0-9]{1,9})?(\s+[0-9]{1,9}(\.[0-9]{1,9})?)*\s*")
"""``0 1 2 3``: the rank of each stage; ``0.1`` is the second module that rank 0 calls."""

_DATA = -1  # in place of the rank that a module takes activations from


class Holder(NamedTuple):
    """The rank that holds a stage, and which of the modules that it calls, in the order of their first calls."""

    rank: int
    chunk: int | None = None


Lanes = Mapping[Lane, tuple[Holder, ...]]


def parse(given: Sequence[str]) -> Lanes:
    """The lanes of ``--lanes``, the one of ``>`` first.  Raises ``RecordError`` for anything else."""
    if not 1 <= len(given) <= len(Lane) or not all(map(LANE.fullmatch, given)):
        raise RecordError(
            "--lanes gives the ranks of each lane's stages, for one lane or two",
            " ".join(map(repr, given)),
            "write --lanes '0 1 2 3' '3 2 1 0', or '0.0 1.0' '1.1 0.1' with the module of each rank",
        )
    lanes = {lane: tuple(map(_holder, text.split())) for lane, text in zip(Lane, given, strict=False)}
    if len({len(holders) for holders in lanes.values()}) > 1:
        raise RecordError(
            "both lanes run the same model", " and ".join(map(repr, given)), "give both the same number of stages"
        )
    for lane, holders in lanes.items():
        for one, other in pairwise(holders):
            if one == other and one.chunk is not None:
                raise RecordError(
                    "two stages are two modules",
                    f"lane {lane} has {one.rank}.{one.chunk} twice",
                    "give each its own number",
                )
    return lanes


def _holder(word: str) -> Holder:
    rank, _, chunk = word.partition(".")
    return Holder(int(rank), int(chunk) if chunk else None)


def check_ranks(lanes: Lanes, ranks: int) -> None:
    """Raise ``RecordError`` if a lane names a rank that the program does not have."""
    for holders in lanes.values():
        for rank, _ in holders:
            if rank >= ranks:
                raise RecordError(
                    "--lanes names ranks of the program", f"rank {rank} of {ranks}", f"use ranks 0 to {ranks - 1}"
                )


def guess(routes: Mapping[Lane, tuple[int, ...]], ranks: int) -> Lanes:
    """The lanes that a program on these ranks most often has, of which ``routes`` are known beginnings.

    One lane continues with the ranks that it lacks, in their order; two lanes are each other's reverse.
    """
    up = list(routes.get(UP, ()))
    if len(routes) > 1:
        up = list(range(ranks))
    up += [rank for rank in range(ranks) if rank not in up]
    lanes = {UP: tuple(map(Holder, up))}
    return lanes | {DOWN: lanes[UP][::-1]} if len(routes) > 1 else lanes


def chains_of(
    lanes: Lanes,
    forwards: Mapping[ForwardId, Forward],
    module_of: Mapping[ForwardId, ModuleId],
    messages: Mapping[MessageId, Message],
) -> list[list[ModuleId | None]]:
    """The module of every stage of every lane, ``None`` for one that was never called.

    A rank that holds several stages has for each the module that was given, or else the one whose messages fit best.
    """
    own: dict[int, list[ModuleId]] = {}
    for module in sorted(set(module_of.values())):
        own.setdefault(module.rank, []).append(module)
    found: dict[tuple[Lane, int], ModuleId] = {}
    free = []
    for lane, holders in lanes.items():
        for stage, (rank, chunk) in enumerate(holders):
            modules = own.get(rank, [])
            if chunk is None:
                free.append((lane, stage))
            elif chunk < len(modules):
                found[lane, stage] = modules[chunk]
    fits = _fits(forwards, module_of, messages)
    scored = sorted(
        (
            (-_score(fits[module], lanes[lane], stage), lane != UP, stage, module.number, module)
            for lane, stage in free
            for module in own.get(lanes[lane][stage].rank, [])
        ),
    )
    for _, is_down, stage, _, module in scored:
        place = DOWN if is_down else UP, stage
        if place not in found and module not in found.values():
            found[place] = module
    return [[found.get((lane, stage)) for stage in range(len(lanes[lane]))] for lane in Lane if lane in lanes]


def _fits(
    forwards: Mapping[ForwardId, Forward],
    module_of: Mapping[ForwardId, ModuleId],
    messages: Mapping[MessageId, Message],
) -> dict[ModuleId, tuple[Counter[int], Counter[int]]]:
    """For every module the ranks that it takes activations from and sends activations to, and how often.

    A forward that takes no message takes data.
    """
    fits: dict[ModuleId, tuple[Counter[int], Counter[int]]] = {m: (Counter(), Counter()) for m in module_of.values()}
    for id, module in module_of.items():
        fits[module][0].update([messages[m].peer for m in forwards[id].messages if m in messages] or [_DATA])
    for message in messages.values():
        for id in message.activation_of if message.send and not message.gradient_of else ():
            if id in module_of:
                fits[module_of[id]][1][message.peer] += 1
    return fits


def _score(fits: tuple[Counter[int], Counter[int]], holders: Sequence[Holder], stage: int) -> int:
    """How many messages of a module fit a stage, less those that do not."""
    neighbours: list[Collection[int]] = [
        {holders[stage - 1].rank if stage else _DATA},
        {holders[stage + 1].rank} if stage + 1 < len(holders) else (),
    ]
    return sum(
        times if peer in near else -times
        for counts, near in zip(fits, neighbours, strict=True)
        for peer, times in counts.items()
    )
