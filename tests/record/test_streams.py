"""Checked streams: an access that no wait orders is refused on the CPU, and names both lines.

two streams, one tensor        write here, read there        an event, wait_stream or synchronize between them
                               read here, write there        or nothing
"""

from __future__ import annotations

import inspect

import pytest
import torch

from dualpipe.testing.launch import launch
from dualpipe.testing.streams import StreamError, checked_streams


def wait_stream(side):
    torch.cuda.current_stream().wait_stream(side)


def wait_event(side):
    torch.cuda.current_stream().wait_event(side.record_event())


def event_wait(side):
    event = torch.cuda.Event()
    event.record(side)
    event.wait()


def synchronize_stream(side):
    side.synchronize()


def synchronize_event(side):
    side.record_event().synchronize()


def synchronize_device(side):
    torch.cuda.synchronize()


def through_a_third(side):
    third = torch.cuda.Stream()
    third.wait_stream(side)
    torch.cuda.current_stream().wait_stream(third)


def nothing(side):
    """The fault."""


def too_early(side):
    """An event that is recorded before the work says nothing about it."""
    torch.cuda.current_stream().wait_event(side.early)


def the_wrong_way(side):
    side.wait_stream(torch.cuda.current_stream())


def read_what_was_written(order):
    side = torch.cuda.Stream()
    side.early = side.record_event()
    with torch.cuda.stream(side):
        y = torch.ones(3) * 2
    order(side)
    return y + 1


def write_what_was_read(order):
    side = torch.cuda.Stream()
    side.early = side.record_event()
    x = torch.ones(3)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.view(3, 1) * 2
    order(side)
    return x.add_(1)


def write_what_was_written(order):
    side = torch.cuda.Stream()
    side.early = side.record_event()
    with torch.cuda.stream(side):
        y = torch.ones(3)
    order(side)
    return torch.add(torch.ones(3), 1, out=y)


def backward_from_a_gradient(order):
    side = torch.cuda.Stream()
    side.early = side.record_event()
    weight = torch.ones(3, requires_grad=True)
    y = weight * 2
    with torch.cuda.stream(side):
        gradient = torch.ones(3)
    order(side)
    y.backward(gradient)
    return weight.grad


USES = [read_what_was_written, write_what_was_read, write_what_was_written, backward_from_a_gradient]
ORDERS = [
    wait_stream,
    wait_event,
    event_wait,
    synchronize_stream,
    synchronize_event,
    synchronize_device,
    through_a_third,
]


@pytest.mark.parametrize("use", USES)
def test_every_kind_of_wait_orders_the_use_of_a_tensor(use):
    for order in ORDERS:
        with checked_streams() as checker:
            assert use(order).tolist()
        assert checker.waited


@pytest.mark.parametrize("order", [nothing, too_early, the_wrong_way])
@pytest.mark.parametrize("use", USES)
def test_a_use_without_a_wait_is_refused(use, order):
    with checked_streams(), pytest.raises(StreamError, match="with no wait between them"):
        use(order)


def test_the_error_names_the_operators_their_lines_and_their_streams():
    with checked_streams(), pytest.raises(StreamError) as error:
        read_what_was_written(nothing)
    lines, first = inspect.getsourcelines(read_what_was_written)
    at = {text.strip(): first + number for number, text in enumerate(lines)}
    assert f"aten.add.Tensor at test_streams.py:{at['return y + 1']} on the first stream reads" in str(error.value)
    written = at["y = torch.ones(3) * 2"]
    assert f"that aten.mul.Tensor at test_streams.py:{written} on stream 2 wrote" in str(error.value)


def test_work_of_one_stream_views_and_older_tensors_need_no_wait():
    older = torch.ones(3)
    with checked_streams() as checker:
        with torch.cuda.stream(torch.cuda.Stream()):
            y = torch.ones(3) * older
            z = y.add_(1)
        assert y.view(3, 1).t().shape == (1, 3)
        with torch.cuda.stream(torch.cuda.Stream()):
            older * 2
    assert checker.operators > 4
    assert checker.waited == 0
    assert z.tolist() == [2.0] * 3


def test_item_waits_for_its_stream_and_nothing_else():
    with checked_streams():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            y = torch.ones(())
            assert y.item() == 1
        assert (y + 1).shape == ()
        with torch.cuda.stream(side):
            z = torch.ones(())
        with pytest.raises(StreamError):
            z.item()


def test_collectives_read_their_inputs_and_write_their_outputs():
    import torch.distributed as dist

    def body(context) -> list[bool]:
        found = []
        for waits in (True, False):
            with checked_streams():
                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    x, y = torch.ones(2), torch.zeros(2)
                wait_stream(side)
                dist.all_to_all_single(y, x)
                if waits:
                    side.wait_stream(torch.cuda.current_stream())
                try:
                    with torch.cuda.stream(side):
                        y.sum()
                    found.append(True)
                except StreamError as error:
                    found.append("alltoall_base_" not in str(error))
        return found

    assert launch(2, body, timeout=60).values() == [[True, False]] * 2


def test_torch_is_as_before_after_the_block_and_blocks_do_not_nest():
    names = ("Stream", "Event", "current_stream", "default_stream", "stream", "set_stream", "synchronize")
    before = [getattr(torch.cuda, name) for name in names]
    with checked_streams():
        assert all(getattr(torch.cuda, name) is not was for name, was in zip(names, before, strict=True))
        with pytest.raises(ValueError, match="one block at a time"), checked_streams():
            pass
        stream = torch.cuda.Stream()
    assert all(getattr(torch.cuda, name) is was for name, was in zip(names, before, strict=True))
    with pytest.raises(ValueError, match="used outside"):
        stream.synchronize()
