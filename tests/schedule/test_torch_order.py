"""DualPipeV, ZBV and interleaved 1F1B compute in the orders of torch's own schedules."""

from dataclasses import replace

import pytest

from dualpipe.schedule import COMPUTE, Schedule, show_slot
from dualpipe.schedule.generate import dualpipev, generate
from tests.schedule import torch_tables

KINDS = {"FORWARD": ("F",), "BACKWARD_INPUT": ("B",), "BACKWARD_WEIGHT": ("W",), "FULL_BACKWARD": ("B", "W")}


def slot(action) -> str:
    """A slot as we write it, by the names of torch's kinds: their values, and ``str``, differ between its versions."""
    if action.sub_actions:
        return "+".join(map(slot, action.sub_actions))
    kinds = KINDS[action.computation_type.name]
    return "+".join(f"{action.stage_index}{kind}{action.microbatch_index}>" for kind in kinds)


def theirs(name: str, ranks: int, microbatches: int) -> list[str]:
    order = torch_tables.order(name, ranks, microbatches)
    return [" ".join(slot(action) for action in order[rank] if action) for rank in range(ranks)]


def ours(schedule: Schedule) -> list[str]:
    return [" ".join(map(show_slot, program)) for program in schedule.only(COMPUTE).programs]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 16])
def test_order_is_that_of_torch(ranks, more):
    assert ours(dualpipev(ranks, 2 * ranks + more)) == theirs("dualpipev", ranks, 2 * ranks + more)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_zbv_is_that_of_torch_also_with_few_microbatches(ranks):
    for microbatches in (1, ranks, 2 * ranks - 1, 2 * ranks, 2 * ranks + 1, 4 * ranks + 3):
        assert ours(generate("zbv", ranks, microbatches)) == theirs("zbv", ranks, microbatches)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_interleaved_1f1b_is_that_of_torch(ranks):
    for groups in (1, 2, 3, 5):
        microbatches = groups * ranks
        assert ours(generate("interleaved", ranks, microbatches)) == theirs("interleaved1f1b", ranks, microbatches)


def test_one_compute_moved_is_another_order():
    schedule = dualpipev(4, 8).only(COMPUTE)
    first, second, *rest = schedule.programs[3]
    moved = replace(schedule, programs=(*schedule.programs[:3], (second, first, *rest)))
    assert ours(moved) != theirs("dualpipev", 4, 8)
