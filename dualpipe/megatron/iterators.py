"""One data iterator dealt to the two lanes, without any change to the data pipeline.

Items are dealt alternately, in world coordinates on every rank alike::

    item of the step         0   1   2   3   4   5
    microbatch of lane >     0       1       2
    microbatch of lane <         0       1       2

So lane ``>`` is what a data-parallel replica with half the microbatches would read, and lane ``<`` another one: with
Megatron's samplers, data parallelism d dealt this way reads what 2d replicas read under 1F1B, sample for sample
(replica j is lane ``>`` of rank j, replica d + j its lane ``<``).

A rank that holds the first stage of one lane holds the last stage of the other, and each reads from its own copy of
the stream: tokens of lane ``>`` on rank 0 and its labels on the last rank are the same item.  On no rank is an item
read twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from dualpipe.errors import RuleError
from dualpipe.schedule import DOWN, UP, Lane

LANES = (UP, DOWN)


class _Dealer:
    """One stream of items and those read from it for a lane that hasn't asked yet."""

    def __init__(self, source: Iterator[Any], lanes: Iterable[Lane]) -> None:
        self.source = source
        self.read = 0
        self.waiting: dict[Lane, deque[Any]] = {lane: deque() for lane in lanes}

    def deal(self) -> None:
        """Read an item and put it where its lane finds it; drop it if the lane reads from another stream."""
        item = next(self.source)
        owner = LANES[self.read % len(LANES)]
        self.read += 1
        if owner in self.waiting:
            self.waiting[owner].append(item)

    def take(self, lane: Lane) -> Any:
        while not self.waiting[lane]:
            self.deal()
        return self.waiting[lane].popleft()

    def read_to(self, end: int) -> None:
        """Read on to an item, unless nothing was read at all or nothing is left."""
        while 0 < self.read < end:
            try:
                self.deal()
            except StopIteration:
                return


class LaneIterator:
    """The microbatches of one lane, in their order."""

    def __init__(self, lane: Lane, dealer: _Dealer) -> None:
        self.lane = lane
        self.taken = 0
        self._dealer = dealer

    def __iter__(self) -> LaneIterator:
        return self

    def __next__(self) -> Any:
        """The lane's next microbatch.

        Raises:
            RuleError: If the data ends before it.  A ``StopIteration`` would end a loop somewhere in silence.
        """
        try:
            item = self._dealer.take(self.lane)
        except StopIteration as end:
            where = len(LANES) * self.taken + LANES.index(self.lane)
            raise RuleError(
                "the data lasts to the end of a step",
                f"it ended before microbatch {self.taken} of lane {self.lane}, which is item {where} of this step",
                f"give an iterator with as many items as the step has microbatches (it gave {self._dealer.read}), "
                "or one that starts over",
            ) from end
        self.taken += 1
        return item


class LaneData:
    """What ``split_data_iterator`` gives: an iterator for each lane, or ``None`` where a rank has no data.

    It unpacks into the iterators of lane ``>`` and lane ``<``, and ``data[lane]`` is the one of a lane.
    """

    def __init__(self, lanes: dict[Lane, LaneIterator | None], dealers: list[_Dealer]) -> None:
        self._lanes = lanes
        self._dealers = dealers

    def __getitem__(self, lane: Lane) -> LaneIterator | None:
        return self._lanes[lane]

    def __iter__(self) -> Iterator[LaneIterator | None]:
        return iter([self._lanes[lane] for lane in LANES])

    @property
    def waiting(self) -> int:
        """How many items were read on the way to others and have not been asked for."""
        return sum(len(items) for dealer in self._dealers for items in dealer.waiting.values())

    def finish(self, microbatches: int) -> None:
        """End a step of so many microbatches, both lanes': leave the stream where the next step begins.

        A rank where only one lane's stage looks at the data stops at an item of that lane.  Reading on to the end of
        the step, and dropping what nobody asked for, keeps every rank at the same item of the stream.
        """
        for dealer in self._dealers:
            dealer.read_to(microbatches)
            for items in dealer.waiting.values():
                items.clear()


def split_data_iterator(data_iterator: Any) -> LaneData:
    """Deal a step's data to the two lanes; call it anew for each step, and ``finish`` at the step's end.

    The stream is read in its own order, when a microbatch is asked for, and no further than that microbatch; only items
    passed over on the way, which belong to the other lane, are kept.  So Megatron-LM's ``RerunDataIterator``, which
    remembers what is read in a step and plays it again after ``rewind()``, sees the same reads in the same order.

    Args:
        data_iterator: What Megatron hands to a schedule:

            - an iterator of microbatches (any object with ``__next__``),
            - ``None``, on a rank without data: both lanes are ``None`` then,
            - a list of one of these,
            - a list of two, one for each model chunk, as Megatron builds it for two chunks: **both carry the whole
              stream**.  If they are one object, it is dealt once.  If they are two, lane ``>`` takes its items from the
              first and lane ``<`` from the second, and each drops the other's.  With ``None`` among them, the other one
              is dealt.

    Raises:
        RuleError: If it is none of these.
    """
    given = list(data_iterator) if isinstance(data_iterator, list | tuple) else [data_iterator]
    if not 1 <= len(given) <= len(LANES):
        raise RuleError(
            "the data is one iterator, or a list of one or two",
            f"a list of {len(given)} came",
            "give one iterator, or one for each of the rank's two model chunks",
        )
    streams = [stream for stream in given if stream is not None]
    for stream in streams:
        if not hasattr(type(stream), "__next__"):
            raise RuleError(
                "the data is an iterator",
                f"a {type(stream).__name__} came",
                "give iter(...) of it, made once for the run",
            )
    if not streams:
        return LaneData(dict.fromkeys(LANES), [])
    if len(streams) == 1 or streams[0] is streams[1]:
        dealers = [_Dealer(streams[0], LANES)]
    else:
        dealers = [_Dealer(stream, [lane]) for stream, lane in zip(streams, LANES, strict=True)]
    lanes = {lane: LaneIterator(lane, dealer) for dealer in dealers for lane in dealer.waiting}
    return LaneData(dict(lanes), dealers)
