"""Microbatches that begin with the same data, in one lane or in both."""

import torch
from torch import nn

from dualpipe.record.plain.data import are_those_of_the_other_lane, note
from dualpipe.schedule import DOWN, UP, Task
from dualpipe.testing import record_ranks
from tests.record.two_ranks import train


def forwards(up, down=""):
    """What the plain runs say of two stages and lanes; a letter is the data of a microbatch."""
    begun = {
        Task(lane, 0, mb): {"data": data} for lane, each in ((UP, up), (DOWN, down)) for mb, data in enumerate(each)
    }
    return begun | {Task(task.lane, 1, task.mb): {"data": "mask"} for task in begun}


def test_a_note_names_the_microbatches_with_the_same_data():
    assert note(forwards("abcd", "efgh"), UP) == ""
    assert note(forwards("abca"), UP) == "microbatches 0 and 3 begin with the same data"
    assert note(forwards("ab", "cb"), DOWN) == "microbatches 1 and 1 of lane > begin with the same data"
    assert (
        note(forwards("aaaa"), UP) == "microbatches 0 and 1, 0 and 2, 0 and 3 and 3 more pairs begin with the same data"
    )
    assert note({Task(UP, 0, 0): {"error": "crashed"}}, UP) == ""


def test_lanes_have_the_same_data_only_if_all_microbatches_do():
    assert are_those_of_the_other_lane(forwards("ab", "ab"))
    assert not are_those_of_the_other_lane(forwards("ab", "ac"))
    assert not are_those_of_the_other_lane(forwards("aa"))


def test_data_that_is_loaded_twice_is_seen_in_a_recording():
    def body(rank):
        torch.manual_seed(1)
        stage = nn.Linear(4, 4)
        for seed in (5, 6, 5):
            torch.manual_seed(seed)
            train(rank, stage, 1)

    comparison = record_ranks(2, body, compare=True).comparison
    assert comparison.verdict == "equal"
    assert [chunk.notes for chunk in comparison.chunks] == [("microbatches 0 and 2 begin with the same data",), ()]
