"""Whether gradients are clipped by the norm of the whole model, concluded from files written by hand."""

import pytest
import torch

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.plain.clipping import judge
from dualpipe.schedule import DOWN, UP, Chunk, Task


def chunks(*scales, lanes=(UP,), microbatches=1):
    """The comparison of a stage on each rank, whose gradients are scaled; with two lanes each stage is on two ranks."""
    return [
        ChunkComparison(
            Chunk(lane, rank if lane is UP else len(scales) - 1 - rank), rank, microbatches, (), (), (), scale=scale
        )
        for lane in lanes
        for rank, scale in enumerate(scales)
    ]


def clipped(scale, count=2, **call):
    """The files of the ranks and their forwards; each parameter has a gradient of norm 3 or 4 times ``scale``."""
    files = {
        rank: {"final": {0: torch.tensor([3.0 + rank]) * scale}, "clipped": call or None, "names": ["w"]}
        for rank in range(count)
    }
    return files, {Task(UP, rank, 0): {"weights": {0: None}} for rank in range(count)}


def test_gradients_scaled_alike_are_clipped_by_the_norm_of_the_whole_model():
    files, forwards = clipped(0.2)
    (note,) = judge(chunks(0.2, 0.2), files, forwards, 1.0).notes
    assert note.endswith("their norm over all stages, each parameter once, was 5 and is 1")
    assert not judge(chunks(0.2, 0.2), files, forwards, 1.0).faults
    (unknown,) = judge(chunks(0.2, 0.2), files, forwards).unknown
    assert unknown.endswith("if they are clipped, give the limit with --clip-norm")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (25.0, "scaled by 0.2 on every rank; their norm over all stages, each parameter once, was 5, as every rank"),
        (2.5, "divided by 2 and scaled by 0.4 on every rank; their norm over all stages, each parameter once, was 2.5"),
        (50.0, "scaled by 0.2 on every rank; their norm over all stages, each parameter once, was 5 and is 1"),
    ],
)
def test_a_norm_or_its_square_that_every_rank_computes_needs_no_limit(value, says):
    files, forwards = clipped(0.2)
    every = [each._replace(mb=mb) for each in forwards for mb in range(2)]
    for file in files.values():
        file["scalars"] = [0.1, value]
    both = chunks(0.2, 0.2, microbatches=2)
    found = judge(both, files, {task: {"weights": {0: None}} for task in every})
    assert says in "".join(found.unknown if value == 50.0 else found.notes)
    given = judge(both, files, {task: {"weights": {0: None}} for task in every}, limit=1.0)
    assert says in given.notes[0]
    assert not given.unknown
    assert found.scale == given.scale == {25.0: 0.2, 2.5: 0.4, 50.0: None}[value]
    files[1]["scalars"].clear()
    assert judge(chunks(0.2, 0.2), files, forwards).unknown


@pytest.mark.parametrize(
    ("scales", "limit", "says"),
    [
        ((-1.0, -1.0), None, "the gradients are scaled by -1 on every rank"),
        ((0.2, 0.1), None, "is the norm of each rank's own gradients used in place of that of the whole model?"),
        ((0.2, 0.2), 2.0, "and is 1, and not 2: the norm that is used is 2 times that"),
        (
            (0.2, 0.2),
            1.16619,
            "and is 1, and not 1.16619: the norm that is used is 1.166 times that: does it count stage 0 twice?",
        ),
        (
            (0.2, 0.2),
            0.6,
            "and is 1, and not 0.6: the norm that is used is 0.6 times that: is it that of stage 0 alone?",
        ),
    ],
)
def test_gradients_clipped_by_another_norm_are_a_fault(scales, limit, says):
    (fault,) = judge(chunks(*scales), *clipped(0.2), limit).faults
    assert fault.endswith(says) or says in fault


def test_a_norm_that_is_no_round_number_afterwards_may_be_no_limit():
    """As that of gradients that are all halved after their norm has been logged."""
    files, forwards = clipped(0.1234)
    for file in files.values():
        file["scalars"] = [5.0]
    assert judge(chunks(0.1234, 0.1234), files, forwards).unknown
    assert not judge(chunks(0.1234, 0.1234), files, forwards, limit=0.617).unknown


def test_a_norm_that_counts_both_replicas_is_named():
    files, forwards = clipped(0.2)
    forwards |= {Task(DOWN, 1 - rank, 0): {"weights": {0: None}} for rank in range(2)}
    for file in files.values():
        file["final"][0] = torch.tensor([1.0])
    both = chunks(0.2, 0.2, lanes=(UP, DOWN))
    (fault,) = judge(both, files, forwards, 2.0).faults  # each of the two stages has a gradient of norm 1
    assert fault.endswith(": the norm counts every parameter twice, once for each replica of its stage")


def test_a_call_of_clip_grad_norm_by_a_ranks_own_norm_is_named():
    files, forwards = clipped(1.0, limit=1.0, norm=3.0, type=2.0, at="train.py:9")
    faults = judge(chunks(1.0, 1.0), files, forwards).faults
    assert faults[0] == (
        "rank 0 clips at train.py:9 by a norm of 3, which is that of the rank's own gradients; over all stages, each "
        "parameter once, it is 5"
    )
