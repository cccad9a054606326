"""The programs of a large schedule, each generated when it is asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

from dualpipe.schedule.op import Lane, Program

MOST_HELD = 2_000_000
"""The most ops of programs that are held; those that were asked for longest ago are generated again."""


class OnDemand(Sequence[Program]):
    """Programs that a function generates by rank.  Equal to the tuple of them all, and of the same hash.

    Parameters
    ----------
    ranks:
        How many programs there are.
    program:
        Gives the program of a rank, always the same, and one that a ``Schedule`` accepts.
    microbatches:
        For each lane how many microbatches the programs name.
    """

    def __init__(self, ranks: int, program: Callable[[int], Program], microbatches: Mapping[Lane, int]) -> None:
        self.microbatches = dict(microbatches)
        self._ranks, self._program = ranks, program
        self._held: OrderedDict[int, Program] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._ranks

    @overload
    def __getitem__(self, rank: int) -> Program: ...
    @overload
    def __getitem__(self, rank: slice) -> tuple[Program, ...]: ...
    def __getitem__(self, rank: int | slice) -> Program | tuple[Program, ...]:
        if isinstance(rank, slice):
            return tuple(self[each] for each in range(self._ranks)[rank])
        rank = range(self._ranks)[rank]  # raises IndexError, and counts from the end as a tuple does
        if rank not in self._held:
            self._held[rank] = self._program(rank)
            self._count += _ops(self._held[rank])
            while self._count > MOST_HELD and len(self._held) > 1:
                self._count -= _ops(self._held.popitem(last=False)[1])
        self._held.move_to_end(rank)
        return self._held[rank]

    def __iter__(self) -> Iterator[Program]:
        return (self[rank] for rank in range(self._ranks))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OnDemand | tuple):
            return NotImplemented
        return len(self) == len(other) and all(own == theirs for own, theirs in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"<{self._ranks} programs, generated on demand>"

    def __reduce__(self) -> tuple[type[tuple[Program, ...]], tuple[tuple[Program, ...]]]:
        return tuple, (tuple(self),)


def _ops(program: Program) -> int:
    return sum(map(len, program))
