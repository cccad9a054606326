"""Data split between two lanes: which item each gets, how far the stream is read, and the error if it ends early.

item of the step         0   1   2   3   4   5
microbatch of lane >     0       1       2
microbatch of lane <         0       1       2
"""

from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.rerun_state_machine import RerunDataIterator, RerunMode, get_rerun_state_machine

from dualpipe.errors import RuleError
from dualpipe.megatron.iterators import LaneData, LaneIterator, _Dealer, split_data_iterator
from dualpipe.schedule import DOWN, UP, Chunk, F
from dualpipe.schedule.generate import generate

interleavings = st.lists(st.sampled_from([UP, DOWN]), max_size=40)


class Stream:
    """An iterator that counts its reads."""

    def __init__(self, items):
        self.items, self.read = iter(items), 0

    def __next__(self):
        item = next(self.items)
        self.read += 1
        return item


def stream():
    return Stream(count())


def forced(ups, downs):
    """The number of items that must be read to get this many microbatches of each lane."""
    return max(2 * ups - 1 if ups else 0, 2 * downs)


def fault(requests, split=split_data_iterator):
    """Describe the first error of a splitter of one stream, or return ``None``."""
    source = stream()
    data = split(source)
    taken = {UP: 0, DOWN: 0}
    for lane in requests:
        item = next(data[lane])
        if item != 2 * taken[lane] + (lane is DOWN):
            return f"lane {lane} got item {item} as its microbatch {taken[lane]}"
        taken[lane] += 1
        must = forced(taken[UP], taken[DOWN])
        if source.read != must:
            return f"{source.read} items were read where {must} are enough"
        if data.waiting != must - taken[UP] - taken[DOWN]:
            return f"{data.waiting} items are kept"
    step = 2 * max(taken.values())
    data.finish(step)
    if source.read != step or data.waiting:
        return f"the step has {step} items, and the next one starts after {source.read}"
    return None


@given(interleavings)
def test_in_any_interleaving_each_lane_gets_its_items_and_reads_no_further_than_needed(requests):
    assert fault(requests) is None


@given(interleavings)
def test_one_iterator_for_both_chunks_and_one_for_each_give_the_same_items(requests):
    both = stream()
    forms = [stream(), [stream()], (stream(),), [both, both], [stream(), stream()], [None, stream()], [stream(), None]]
    for form in forms:
        data = split_data_iterator(form)
        taken = {UP: 0, DOWN: 0}
        for lane in requests:
            assert next(data[lane]) == 2 * taken[lane] + (lane is DOWN)
            taken[lane] += 1


@given(st.lists(interleavings, max_size=4))
def test_two_iterators_with_the_same_data_stay_in_step(steps):
    first, second = stream(), stream()
    for requests in steps:
        per_lane = max(requests.count(UP), requests.count(DOWN))
        data = split_data_iterator([first, second])
        for up, down in ((next(data[UP]), next(data[DOWN])) for _ in range(per_lane)):
            assert (up % 2, down) == (0, up + 1)
        assert data.waiting == 0
        data.finish(2 * per_lane)
        assert first.read == second.read


# Planted faults


def swapped(source):
    data = split_data_iterator(source)
    return LaneData({UP: data[DOWN], DOWN: data[UP]}, data._dealers)


def halves(source):
    """Gives each lane items in the order of reading, whichever lane takes one."""
    dealer = _Dealer(source, [UP, DOWN])
    dealer.deal = lambda: [queue.append(next(source)) for queue in dealer.waiting.values()]
    return LaneData({lane: LaneIterator(lane, dealer) for lane in (UP, DOWN)}, [dealer])


class Eager(_Dealer):
    def take(self, lane):
        item = super().take(lane)
        self.deal()
        return item


def eager(source):
    dealer = Eager(source, [UP, DOWN])
    return LaneData({lane: LaneIterator(lane, dealer) for lane in (UP, DOWN)}, [dealer])


def doubly_fed(source):
    """Each lane reads one stream itself, as if it had its own copy."""
    dealers = [_Dealer(source, [lane]) for lane in (UP, DOWN)]
    return LaneData({lane: LaneIterator(lane, d) for d in dealers for lane in d.waiting}, dealers)


class Unfinished(LaneData):
    def finish(self, microbatches):
        pass


def unfinished(source):
    data = split_data_iterator(source)
    return Unfinished(data._iterators, data._dealers)


@pytest.mark.parametrize("planted", [swapped, halves, eager, doubly_fed, unfinished])
def test_a_planted_fault_is_found(planted):
    requests = [UP, UP, DOWN, UP, DOWN, DOWN, UP]
    assert fault(requests) is None
    assert fault(requests, planted) is not None


# With the order of the schedule


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (2, 10), (4, 8), (4, 20), (8, 16), (8, 40)])
def test_the_first_and_last_rank_keep_at_most_one_item_for_each_rank(ranks, microbatches):
    schedule = generate("dualpipe", ranks, microbatches)
    for rank in (0, ranks - 1):
        source = Stream(range(microbatches))
        data = split_data_iterator(source)
        most = 0
        for op in (op for slot in schedule.programs[rank] for op in slot if op.kind is F):
            assert next(data[op.lane]) == 2 * op.mb + (op.lane is DOWN)
            most = max(most, data.waiting)
        assert source.read == microbatches
        assert data.waiting == 0
        assert most <= ranks


# The end of the data


def test_data_that_ends_early_raises_with_microbatch_and_lane():
    data = split_data_iterator(Stream(range(5)))
    assert [next(data[UP]) for _ in range(3)] == [0, 2, 4]
    assert [next(data[DOWN]) for _ in range(2)] == [1, 3]
    with pytest.raises(RuleError) as caught:
        next(data[DOWN])
    assert str(caught.value) == (
        "the data must have an item for every microbatch of a step: it ended before microbatch 2 of lane <, "
        "which is item 5 of this step; "
        "pass an iterator with as many items as the step has microbatches (it had 5), or one that starts over"
    )


def test_the_end_of_the_data_does_not_silently_end_a_loop():
    up, _ = split_data_iterator(Stream(range(3)))
    with pytest.raises(RuleError):
        list(up)


def test_an_error_in_the_data_pipeline_is_passed_on_unchanged():
    def failing():
        yield 0
        raise OSError("disk")

    up, _ = split_data_iterator(failing())
    assert next(up) == 0
    with pytest.raises(OSError, match="disk"):
        next(up)


# One lane, two chunks


def test_with_one_lane_a_chunk_may_change_its_microbatch():
    first, last = Chunk(UP, 0), Chunk(UP, 3)
    data = split_data_iterator(iter([{"tokens": 1, "loss_mask": 2}]), (first, last))
    next(data[first])["loss_mask"] = None
    assert next(data[last]) == {"tokens": 1, "loss_mask": 2}


def test_with_one_lane_both_chunks_of_a_rank_get_every_item():
    first, last = Chunk(UP, 0), Chunk(UP, 3)
    source = stream()
    data = split_data_iterator(source, [first, last])
    assert [next(data[first]) for _ in range(3)] == [next(data[last]) for _ in range(3)] == [0, 1, 2]
    assert (source.read, data.waiting) == (3, 0)
    assert next(data[last]) == 3
    data.finish(4)
    assert list(map(next, split_data_iterator([source, stream()], [last, first]))) == [4, 0]
    short = split_data_iterator(Stream(range(1)), [first, last])[last]
    assert next(short) == 0
    with pytest.raises(RuleError, match="before microbatch 1 of lane >, which is item 1 of this step"):
        next(short)


# Steps


def test_the_next_step_continues_where_this_one_ended():
    source = stream()
    for first in (0, 4):
        data = split_data_iterator(source)
        assert [next(data[UP]), next(data[DOWN]), next(data[DOWN]), next(data[UP])] == [first + i for i in (0, 1, 3, 2)]
        data.finish(4)


def test_a_step_may_have_an_odd_number_of_microbatches():
    source = stream()
    data = split_data_iterator(source)
    assert [next(data[UP]), next(data[DOWN]), next(data[UP])] == [0, 1, 2]
    data.finish(3)
    assert next(split_data_iterator(source)[UP]) == 3


@pytest.mark.parametrize("lane", [UP, DOWN])
def test_a_rank_where_only_one_lane_takes_data_stays_in_step_with_the_others(lane):
    source = stream()
    data = split_data_iterator(source)
    assert [next(data[lane]) for _ in range(3)] == [i + (lane is DOWN) for i in (0, 2, 4)]
    data.finish(6)
    assert next(source) == 6


def test_a_rank_that_takes_no_data_reads_none():
    source = stream()
    split_data_iterator(source).finish(6)
    assert source.read == 0


def test_a_step_may_end_where_the_data_ends():
    data = split_data_iterator(Stream(range(1)))
    assert next(data[UP]) == 0
    data.finish(2)


# The forms of data


@pytest.mark.parametrize("nothing", [None, [None], [None, None]])
def test_without_data_both_lanes_are_none(nothing):
    assert list(split_data_iterator(nothing)) == [None, None]


def test_lane_iterators_are_iterators():
    up, down = split_data_iterator(stream())
    assert iter(up) is up
    assert (up.lane, down.lane) == (UP, DOWN)


@pytest.mark.parametrize("wrong", [[], [iter([]), iter([]), iter([])], range(3), [range(3)], "data"])
def test_data_that_is_not_an_iterator_is_refused(wrong):
    with pytest.raises(RuleError):
        split_data_iterator(wrong)


# With Megatron-LM's replaying iterator


@pytest.fixture
def rerunning():
    machine = get_rerun_state_machine()
    mode = machine.get_mode()
    machine.set_mode(RerunMode.VALIDATE_RESULTS)
    yield
    machine.set_mode(mode)


def test_megatrons_replaying_iterator_replays_a_step_for_both_lanes(rerunning):
    def step(order):
        data = split_data_iterator(stream)
        up, down = data
        taken = [next(up if lane == ">" else down) for lane in order]
        data.finish(len(order))
        return taken

    stream = RerunDataIterator(iter(range(8)))
    first = step(">><>><<<")
    assert first == [0, 2, 1, 4, 6, 3, 5, 7]
    assert stream.saved_microbatches == list(range(8))
    stream.rewind()
    assert step(">><>><<<") == first
    stream.rewind()
    assert step("><><><><") == list(range(8))


def test_the_step_after_a_replay_reads_the_next_items(rerunning):
    stream = RerunDataIterator(iter(range(8)))
    for start in (0, 4):
        stream.advance()
        for _ in range(2):
            data = split_data_iterator(stream)
            up, down = data
            assert [next(up), next(up), next(down), next(down)] == [start, start + 2, start + 1, start + 3]
            data.finish(4)
            stream.rewind()
