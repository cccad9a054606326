"""Splits one data iterator between the two chunks of a rank, without any change to the data pipeline.

The lanes take items in turn, and every rank assigns them in the same way::

    item of the step         0   1   2   3   4   5
    microbatch of lane >     0       1       2
    microbatch of lane <         0       1       2

So each lane reads what a data-parallel replica with half the microbatches would read.  With Megatron's samplers and
data parallelism d, the lanes read the samples of 2d replicas under 1F1B: lane ``>`` of rank j those of replica j, lane
``<`` those of replica d + j.

Under DualPipe the first and the last rank each hold the first stage of one lane and the last stage of the other, and
each reads its own copy of the stream: the tokens of a microbatch of lane ``>`` on rank 0 and its labels on the last
rank are from the same item.  No rank reads an item twice.

Under DualPipeV there is one lane, and both chunks of a rank get every item: on the first rank the first stage takes its
tokens, and later the last stage its labels.  Each chunk gets a dict or list of its own, with the same tensors: loops
take out what a stage does not need (Megatron-LM's main sets the first stage's ``loss_mask`` to ``None``).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dualpipe.errors import RuleError
from dualpipe.schedule import DOWN, UP, Chunk, Lane

LANES = (UP, DOWN)
Reader = Lane | Chunk
"""Who takes items: the chunk of a lane, or one of two chunks of the same lane."""


def _lane(reader: Reader) -> Lane:
    return reader if isinstance(reader, Lane) else reader.lane


def _in_order_of_data(chunk: Chunk) -> tuple[int, int]:
    return LANES.index(chunk.lane), chunk.stage


class _Dealer:
    """A stream, and the items read from it that their readers have not taken yet.

    ``lanes`` are those among which items are dealt in turn.
    """

    def __init__(self, source: Iterator[Any], readers: Iterable[Reader], lanes: Sequence[Lane] = LANES) -> None:
        self.source = source
        self.lanes = lanes
        self.read = 0
        self.waiting: dict[Reader, deque[Any]] = {reader: deque() for reader in readers}

    def deal(self) -> None:
        """Read an item and keep it for the readers of its lane; drop it if they read from another stream."""
        item = next(self.source)
        owner = self.lanes[self.read % len(self.lanes)]
        self.read += 1
        for reader, items in self.waiting.items():
            if _lane(reader) is owner:
                items.append(copy.copy(item) if isinstance(item, dict | list) else item)

    def take(self, reader: Reader) -> Any:
        while not self.waiting[reader]:
            self.deal()
        return self.waiting[reader].popleft()

    def read_to(self, end: int) -> None:
        """Read on up to item ``end``, unless nothing was read at all or the stream ends."""
        while 0 < self.read < end:
            try:
                self.deal()
            except StopIteration:
                return


class LaneIterator:
    """The microbatches of one lane, in their order, for one reader."""

    def __init__(self, reader: Reader, dealer: _Dealer) -> None:
        self.reader = reader
        self.lane = _lane(reader)
        self.taken = 0
        self._dealer = dealer

    def __iter__(self) -> LaneIterator:
        return self

    def __next__(self) -> Any:
        """The lane's next microbatch.

        Raises:
            RuleError: If the data ends before it.  A ``StopIteration`` would silently end some loop.
        """
        try:
            item = self._dealer.take(self.reader)
        except StopIteration as end:
            lanes = self._dealer.lanes
            where = len(lanes) * self.taken + lanes.index(self.lane)
            raise RuleError(
                "the data must have an item for every microbatch of a step",
                f"it ended before microbatch {self.taken} of lane {self.lane}, which is item {where} of this step",
                f"pass an iterator with as many items as the step has microbatches (it had {self._dealer.read}), "
                "or one that starts over",
            ) from end
        self.taken += 1
        return item


class LaneData:
    """The result of ``split_data_iterator``: an iterator for each lane or chunk, or ``None`` on a rank without data.

    It unpacks into the iterators in their order, by default those of lane ``>`` and lane ``<``; ``data[lane]`` or
    ``data[chunk]`` is one of them.
    """

    def __init__(self, iterators: dict[Reader, LaneIterator | None], dealers: list[_Dealer]) -> None:
        self._iterators = iterators
        self._dealers = dealers

    def __getitem__(self, reader: Reader) -> LaneIterator | None:
        return self._iterators[reader]

    def __iter__(self) -> Iterator[LaneIterator | None]:
        return iter(self._iterators.values())

    @property
    def waiting(self) -> int:
        """The number of items that were read before a later one and have not been taken."""
        return sum(len(items) for dealer in self._dealers for items in dealer.waiting.values())

    def finish(self, microbatches: int) -> None:
        """End a step of ``microbatches`` in all lanes together: advance the stream to where the next step begins.

        If only one lane's stage takes data on a rank, reading has stopped at an item of that lane.  Reading on to the
        end of the step, and dropping the items that were not taken, keeps every rank at the same item of the stream.
        """
        for dealer in self._dealers:
            dealer.read_to(microbatches)
            for items in dealer.waiting.values():
                items.clear()


def split_data_iterator(data_iterator: Any, chunks: Sequence[Chunk] | None = None) -> LaneData:
    """Split a step's data between the two lanes; call it once for each step, and ``finish`` at the end of the step.

    The stream is read in its own order, only when a microbatch is taken, and only up to that microbatch; items of the
    other lane on the way are kept.  So Megatron-LM's ``RerunDataIterator``, which records the reads of a step and
    replays them after ``rewind()``, gets the same reads in the same order.

    Args:
        data_iterator: What Megatron passes to a schedule:

            - an iterator of microbatches (any object with ``__next__``),
            - ``None``, on a rank without data: both lanes are ``None`` then,
            - a list of one of these,
            - a list of two, one for each model chunk, as Megatron builds it for two chunks: **each has the whole
              stream**.  If both are the same object, it is split once.  If not, lane ``>`` takes its items from the
              first and lane ``<`` from the second, and each drops the other's.  If one is ``None``, the other is split.

        chunks: The two chunks of a rank, each of which gets an iterator; items are dealt among their lanes.

    Raises:
        RuleError: If it is none of these.
    """
    given = list(data_iterator) if isinstance(data_iterator, list | tuple) else [data_iterator]
    if not 1 <= len(given) <= len(LANES):
        raise RuleError(
            "the data must be one iterator, or a list of one or two",
            f"got a list of {len(given)}",
            "pass one iterator, or one for each of the rank's two model chunks",
        )
    streams = [stream for stream in given if stream is not None]
    for stream in streams:
        if not hasattr(type(stream), "__next__"):
            raise RuleError(
                "the data must be an iterator",
                f"got a {type(stream).__name__}",
                "pass iter(...) of it, created once for the run",
            )
    readers: list[Reader] = [*LANES] if chunks is None else [*sorted(chunks, key=_in_order_of_data)]
    if not streams:
        return LaneData(dict.fromkeys(readers), [])
    lanes = list(dict.fromkeys(map(_lane, readers)))
    if len(streams) == 1 or streams[0] is streams[1]:
        dealers = [_Dealer(streams[0], readers, lanes)]
    else:
        dealers = [_Dealer(stream, [reader], lanes) for stream, reader in zip(streams, readers, strict=True)]
    return LaneData({reader: LaneIterator(reader, dealer) for dealer in dealers for reader in dealer.waiting}, dealers)
