"""The exchange of shapes before activations adds no deadlock to DualPipe and DualPipeV, and one to another schedule."""

from __future__ import annotations

import pytest

from dualpipe.schedule.generate import generate, with_late_w
from dualpipe.schedule.shapes import with_shape_exchange
from proofs.prove import prove


@pytest.mark.parametrize("size", [(2, 7), (4, 8), (6, 14)], ids=str)
@pytest.mark.parametrize("late_w", ["none", "tail", "all"])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
def test_the_exchange_adds_no_deadlock(name, late_w, size):
    if name == "dualpipe" and size[1] % 2:
        size = (size[0], size[1] + 1)
    schedule = generate(with_late_w(name, late_w), *size)
    report = prove(with_shape_exchange(schedule))
    assert report.verdict == "proved", report.text()


def test_the_exchange_of_interleaved_1f1b_is_a_wait_cycle():
    """A rank posts the receive of a gradient together with that of an activation, whose shape it waits for first."""
    schedule = generate("interleaved", 2, 4)
    assert prove(schedule).verdict == "proved"
    report = prove(with_shape_exchange(schedule))
    assert report.verdict == "refuted"
    assert "joins the all-reduce" in report.text()
