"""Splits one data iterator between the two chunks of a rank, without any change to the data pipeline.

The lanes take items in turn, and every rank assigns them in the same way::

    item of the step         0   1   2   3   4   5
    microbatch of lane >     0       1       2
    microbatch of lane <         0       1       2

So each lane reads what a data-parallel replica with half the microbatches would read.  With Megatron's samplers and d
data-parallel ranks, the lanes read the samples that 2d replicas read under 1F1B: lane ``>`` of data-parallel rank j
reads those of replica j, and lane ``<`` those of replica d + j.

Under DualPipe the first and the last rank each hold the first stage of one lane and the last stage of the other.  Each
of the two ranks has a stream of its own with the same items.  Rank 0 takes the tokens of a microbatch of lane ``>``
from an item, and the last rank its labels from the same item.  No rank reads an item of its stream twice.

Under DualPipeV there is one lane, and both chunks of a rank get every item: on the first rank the first stage takes its
tokens, and later the last stage its labels.  If an item is a dict or a list, each chunk gets a copy of it with the same
tensors, because training loops remove what a stage does not need (Megatron-LM's main branch sets the first stage's
``loss_mask`` to ``None``).
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
"""What takes items: a lane, if the rank has one chunk of each lane; a chunk, if both are of the same lane."""


def _lane(reader: Reader) -> Lane:
    return reader if isinstance(reader, Lane) else reader.lane


def _by_lane_and_stage(chunk: Chunk) -> tuple[int, int]:
    return LANES.index(chunk.lane), chunk.stage


class _Dealer:
    """Reads one stream and deals its items to ``lanes`` in turn.

    ``waiting`` has for each reader the items of its lane that it has not taken yet.  The items of a lane without a
    reader are dropped.
    """

    def __init__(self, source: Iterator[Any], readers: Iterable[Reader], lanes: Sequence[Lane] = LANES) -> None:
        self.source = source
        self.lanes = lanes
        self.read = 0
        self.waiting: dict[Reader, deque[Any]] = {reader: deque() for reader in readers}

    def deal(self) -> None:
        """Read one item and keep it for the readers of its lane, if there are any."""
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
        """Read on until ``end`` items were read in all, or until the stream ends.  An unread stream is left alone."""
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
            RuleError: If the data ends before it.  Not ``StopIteration``: a loop that calls this would end silently.
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
        """The number of items that were read and have not been taken."""
        return sum(len(items) for dealer in self._dealers for items in dealer.waiting.values())

    def finish(self, microbatches: int) -> None:
        """End a step: advance the stream to the first item of the next step.

        ``microbatches`` counts those of the step on all lanes together.  A rank on which only one lane takes data has
        stopped reading at the last item of that lane.  It reads on to the end of the step and drops what was not taken,
        so all ranks begin the next step at the same item.
        """
        for dealer in self._dealers:
            dealer.read_to(microbatches)
            for items in dealer.waiting.values():
                items.clear()


def split_data_iterator(data_iterator: Any, chunks: Sequence[Chunk] | None = None) -> LaneData:
    """Split a step's data between the two lanes; call it once for each step, and ``finish`` at the end of the step.

    The stream is read in order, and only when a microbatch is taken, up to the item of that microbatch.  Items of the
    other lane that are read on the way are kept.  So Megatron-LM's ``RerunDataIterator``, which records the reads of a
    step and replays them after ``rewind()``, sees the same reads in the same order.

    Args:
        data_iterator: What Megatron passes to a schedule:

            - an iterator of microbatches (any object with ``__next__``),
            - ``None``, on a rank without data: both lanes get ``None``,
            - a list with one of these,
            - a list of two, one for each model chunk, as Megatron builds it for two chunks: **each has the whole
              stream**.  If both are the same object, that stream is split.  If not, lane ``>`` takes its items from
              the first stream and lane ``<`` from the second, and the items of the other lane are dropped.  If one is
              ``None``, the other one is split.

        chunks: The two chunks of the rank, if each of them is to get an iterator (in place of each lane).  Items are
            dealt to the lanes of these chunks.

    Raises:
        RuleError: If ``data_iterator`` is none of these.
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
    readers: list[Reader] = [*LANES] if chunks is None else [*sorted(chunks, key=_by_lane_and_stage)]
    if not streams:
        return LaneData(dict.fromkeys(readers), [])
    lanes = list(dict.fromkeys(map(_lane, readers)))
    if len(streams) == 1 or streams[0] is streams[1]:
        dealers = [_Dealer(streams[0], readers, lanes)]
    else:
        dealers = [_Dealer(stream, [reader], lanes) for stream, reader in zip(streams, readers, strict=True)]
    return LaneData({reader: LaneIterator(reader, dealer) for dealer in dealers for reader in dealer.waiting}, dealers)
