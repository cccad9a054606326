"""What is concluded from gradients, norms, weights and losses of a recorded step, one function at a time."""

from dataclasses import replace

import pytest
import torch

from dualpipe.record.child.transport import Transport
from dualpipe.record.comparison import ChunkComparison, Comparison, LossComparison, LossWeights
from dualpipe.record.events import ForwardId, read
from dualpipe.record.plain.gradients import Agreement, Line, Parts, agreement, scale_of, with_earlier
from dualpipe.record.plain.losses import losses_of
from dualpipe.record.plain.replicas import differences, updates
from dualpipe.record.plain.sums import factor_of_shards
from dualpipe.schedule import DOWN, UP, Chunk, Op, Task, W

MICROBATCHES = 3
OWN = dict(enumerate(torch.randn(MICROBATCHES, 4, 4, generator=torch.Generator().manual_seed(1)).double()))
FAR = dict(enumerate(torch.randn(MICROBATCHES, 4, 4, generator=torch.Generator().manual_seed(2)).double()))


def weighted(*factors, far=()):
    parts = [factor * OWN[mb] for mb, factor in enumerate(factors)] + [
        factor * FAR[mb] for mb, factor in enumerate(far)
    ]
    return torch.stack(parts).sum(0)


@pytest.mark.parametrize(
    ("final", "says"),
    [
        (
            weighted(0, 0, 1),
            "the gradient lacks microbatches 0 1: is it set to zero or None, or replaced, in the middle",
        ),
        (
            weighted(1, 1, 0),
            "lacks microbatch 2: is it used before that weight gradient runs, or is that added to another tensor",
        ),
        (
            weighted(1, 0, 1),
            "lacks microbatch 1: is it used before that weight gradient runs, or is that added to another tensor",
        ),
        (weighted(1, 2, 1), "microbatch 1 twice: is a weight gradient run twice, or added by the backward as well?"),
        (weighted(1 / 4, 1 / 2, 1), "is the sum so far rescaled whenever a gradient is added? 0W1> is at here.py:1"),
        (
            weighted(0.0004, 0.02, 1),
            "has nearly nothing of microbatch 0, and has microbatch 1 0.02 times and microbatch 2 once: is the sum so",
        ),
        (
            weighted(0, 1 / 5, 2 / 5),
            "lacks microbatch 0, and has microbatch 1 once and microbatch 2 twice: is it set to",
        ),
        (weighted(0, 1, 2), "in the middle of the step? Is a weight gradient run twice, or added by the backward as"),
        (weighted(0, 1, 2), "0W2> is at here.py:2"),
        (torch.zeros(4, 4), "the gradient is zero, but not in the plain run"),
        (torch.ones(4, 4), "the gradient differs by up to "),
        (None, "no gradient, but the plain run has one: are weight gradients put into the store, and run from it?"),
    ],
)
def test_a_gradient_that_differs_is_told_in_terms_of_its_microbatches(final, says):
    parts = Parts(0, UP, OWN, None, None, {}, {})
    found = agreement(final, parts, (3,), line=lambda mb: Line(Op(W, UP, 0, mb), f"here.py:{mb}"))
    assert isinstance(found, str)
    assert says in found


@pytest.mark.parametrize(
    ("final", "says"),
    [
        (weighted(1, 1, 0), "is it finalized or used before the last weight gradients, or are these never run?"),
        (weighted(1, 0, 1), "is it without a weight gradient that is stored and never run?"),
    ],
)
def test_a_weight_gradient_that_was_not_seen_may_never_run(final, says):
    assert str(agreement(final, Parts(0, UP, OWN, None, None, {}, {}), (3,))).endswith(says)


@pytest.mark.parametrize(
    ("final", "expected"),
    [
        (weighted(1, 1, 1, far=(1, 1, 1)), Agreement("summed over both lanes, equal up to rounding", True)),
        (weighted(1, 1, 1), Agreement("equal up to rounding", False)),
        (weighted(0.1, 0.1, 0.1), Agreement("scaled by 0.1, up to rounding", False, pytest.approx(0.1))),
        (weighted(1 / 3, 1 / 3, 1 / 3), Agreement("divided by 3, up to rounding", False, 1.0, 3)),
    ],
)
def test_a_gradient_agrees_up_to_rounding_with_its_own_lane_or_with_both(final, expected):
    found = agreement(final * (1 + 1e-9), Parts(0, UP, OWN, FAR, None, {}, {}), (3,))
    assert found == expected


def test_a_gradient_of_zero_does_not_show_whether_it_is_summed_over_both_lanes():
    """As that of a layer before an output layer that starts at zero."""
    zero = {mb: torch.zeros(4, 4) for mb in range(3)}
    assert agreement(torch.zeros(4, 4), Parts(0, UP, zero, zero, None, {}, {}), (3,)) == Agreement("")


def test_a_gradient_of_one_lane_and_half_of_the_other_is_told_with_the_lane():
    found = agreement(weighted(1, 1, 1, far=(1, 0, 1)), Parts(0, UP, OWN, FAR, None, {}, {}), (3,))
    assert found.startswith("the gradient lacks microbatch 1 of lane <: is it reduced over the lanes before")


@pytest.mark.parametrize(("own", "far", "lanes"), [(0, 0, None), (0, 1, "lane <"), (1, 0, "lane >")])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_a_gradient_of_an_earlier_step_is_found_in_either_replica_however_it_is_scaled(own, far, lanes, scale):
    kept = [torch.randn(4, 4).double() if each else None for each in (own, far)]
    parts = Parts(0, UP, OWN, FAR, kept[0], {}, {}, other_before=kept[1])
    final = scale * torch.stack([weighted(1, 1, 1, far=(1, 1, 1)), *filter(lambda each: each is not None, kept)]).sum(0)
    known = scale_of(final, parts)
    assert known == pytest.approx(scale)
    found = agreement(final, parts, (3,), scales=[known])
    assert isinstance(found, Agreement)
    assert found.summed
    later = with_earlier(found, parts, 2)
    assert later == found if lanes is None else later.startswith(f"the gradient includes that of {lanes} of an earlier")
    assert bool(with_earlier(found, parts, 1).how.endswith("added to what was there before the step")) == bool(lanes)


@pytest.mark.parametrize(("far", "rest"), [((0, 1, 1), " and microbatch 0 of lane <"), ((0, 0, 0), "")])
def test_a_gradient_of_few_elements_is_told_in_terms_of_consecutive_microbatches(far, rest):
    own, other = ({mb: g[:1] for mb, g in each.items()} for each in (OWN, FAR))
    found = agreement(weighted(0, 0.2, 0.2, far=[0.2 * f for f in far])[:1], Parts(0, UP, own, other, None, {}, {}), ())
    assert found.startswith(f"the gradient lacks microbatch 0{rest}{'' if rest else ' and is not summed over both'}")
    unlike = agreement(torch.ones(1, 4), Parts(0, UP, own, other, None, {}, {}), ())
    assert unlike.startswith("the gradient differs by up to ")


def replicas(one, other, **more):
    """What is wrong with the replicas of stage 0 on ranks 0 and 1, whose files are given."""
    found = [ChunkComparison(Chunk(lane, 0), rank, 1, (), (), (), **more) for rank, lane in enumerate((UP, DOWN))]
    base = {"names": ["w"], "by_optimizer": True, "weights": {0: torch.ones(2)}, "changed": {0: torch.zeros(2)}}
    files = {rank: base | file for rank, file in enumerate((one, other))}
    forwards = {
        Task(lane, 0, 0): {"weights": {0: None}, "layers": files[rank].get("layers", {})}
        for rank, lane in enumerate((UP, DOWN))
    }
    return [*differences(found, files, forwards), *updates(found, files, forwards)]


@pytest.mark.parametrize(
    ("other", "summed", "says"),
    [
        ({}, True, ""),
        ({}, False, "the replicas of stage 0 were not summed before the optimizer's step: each would be updated by"),
        (
            {"weights": {0: torch.full((2,), 2.0)}},
            True,
            "have different weights before the step: w. Are the weights of",
        ),
        ({"changed": {0: torch.ones(2)}}, True, "after the optimizer's step: w: that on rank 1 is not updated"),
        (
            {"names": ["v"]},
            True,
            "have other parameters: v, w only on rank 1. Is the chunk built for the rank's number",
        ),
        ({"layers": {"layer_number": 4}}, True, "layer_number is 1 on rank 0 and 4 on rank 1"),
    ],
)
def test_what_is_wrong_with_replicas(other, summed, says):
    found = replicas({"layers": {"layer_number": 1}}, {"layers": {"layer_number": 1}} | other, summed=summed)
    assert [says in fault for fault in found] == ([True] if says else [])


def test_stages_that_were_summed_are_told_from_those_that_were_not():
    """Two ranks with two stages on both lanes, of which only the first chunk of each rank is finalized."""
    found = [
        ChunkComparison(Chunk(lane, stage), stage if lane is UP else 1 - stage, 1, (), (), (), summed=stage == 0)
        for lane in (UP, DOWN)
        for stage in (0, 1)
    ]
    files = {rank: {"names": ["w"], "by_optimizer": True} for rank in (0, 1)}
    (line,) = differences(found, files, {}, lambda each: f"all_reduce at ddp.py:{each.rank}")
    assert line == (
        "the replicas of stage 1 were not summed before the optimizer's step, and those of stage 0 were (all_reduce at "
        "ddp.py:0). Is only one chunk of each rank finalized?"
    )


def test_layers_that_are_numbered_differently_at_several_stages_are_one_line():
    found = [
        ChunkComparison(Chunk(lane, stage), stage if lane is UP else 1 - stage, 1, (), (), ())
        for lane in (UP, DOWN)
        for stage in (0, 1)
    ]
    files = {rank: {"names": ["w"], "weights": {0: torch.ones(2)}} for rank in (0, 1)}
    forwards = {
        Task(*each.chunk, 0): {"weights": {0: None}, "layers": {"layer_number": each.rank + 1}} for each in found
    }
    (line,) = differences(found, files, forwards)
    assert line.startswith(
        "the replicas of stages 0 1 number their layers differently: at stage 0, layer_number is 1 on rank 0 and 2 on "
        "rank 1. Is the mirror chunk numbered"
    )


def test_losses_are_counted_as_computed_kept_and_read():
    begun = {"event": "forward", "module": 0, "messages": [], "after": [], "first": True, "again": None, "grad": True}
    events = [begun | {"forward": n, "at": "x.py:1"} for n in range(3)]
    events += [{"event": "backward", "forwards": [n], "untrainable": [], "run": n} for n in range(2)]
    tasks = {ForwardId(0, n): Task(UP, 0, n) for n in range(3)}
    file = {"seen": [0], "collected": [0, 1], "read": [1], "by_optimizer": True}
    file |= {"roots": {0: 1.0, 1: 2.0}, "losses": {0: [2.0], 1: [4.0]}}
    compared = [ChunkComparison(Chunk(UP, 0), 0, 3, (), (), (), divided_by=2)]
    (found,) = losses_of({0: file}, [read(0, events)], tasks, {UP: (0,)}, compared, LossWeights())
    assert (found.microbatches, found.computed, found.seen, found.collected, found.read) == (3, 2, 1, True, 1)
    assert [fault.partition(":")[0] for fault in found.faults] == [
        "only 2 of 3 backwards began from a loss",
        "2 were computed and collected, and only 1 are kept or read by the end of the step",
        "each loss is divided by 2 before its backward, and the gradients are divided by 2 once more",
    ]
    assert not list(losses_of({0: {"error": "no run"}}, [read(0, events)], tasks, {UP: (0,)}, compared, LossWeights()))


def test_losses_that_only_other_ranks_read_go_there_in_a_collective():
    begun = {"event": "forward", "module": 0, "messages": [], "after": [], "first": True, "again": None, "grad": True}
    reduced = {"event": "collective", "collective": 0, "name": "all_reduce", "group": [0, 1], "group_name": "0"}
    reduced |= {"form": [], "modules": [], "names": [], "marks": [("F", 0)], "context": [], "at": "x.py:9"}
    backward = {"event": "backward", "forwards": [0], "untrainable": [], "run": 0}
    file = {"seen": [0], "collected": [0], "read": [], "by_optimizer": True}

    def notes(*events):
        log = read(0, [begun | {"forward": 0, "at": "x.py:1"}, backward, *events])
        end = ChunkComparison(Chunk(UP, 0), 0, 1, (), (), ())
        (found,) = losses_of({0: file}, [log], {ForwardId(0, 0): Task(UP, 0, 0)}, {UP: (0,)}, [end], LossWeights())
        return found.notes

    assert notes(reduced) == ("they go to other ranks in the all_reduce at x.py:9",)
    for other in ({"marks": []}, {"context": [("F", 0)]}):  # on something else, or in a layer of the stage
        assert notes(reduced | other)[0].startswith("none of them is ever read on rank 0: does the program read its")


def test_the_reason_is_directly_below_the_verdict_and_stages_of_which_the_same_is_said_share_a_line():
    divided = [LossComparison(lane, rank, 5, 5, 5, True, 5, 5) for lane, rank in ((UP, 1), (DOWN, 0))]
    held = [(UP, 0, 0), (UP, 1, 1), (DOWN, 1, 0), (DOWN, 0, 1)]
    every = [ChunkComparison(Chunk(lane, stage), rank, 1, (), (), ()) for lane, stage, rank in held]
    shown = Comparison(tuple(every), tuple(divided), (), changes=("rank 0 changes gradients in place: div_ at x.py:3",))
    lines = shown.text().splitlines()
    assert lines[0].endswith(": different")
    assert [line.strip().partition(" ")[0] for line in lines[1:4]] == ["losses", "losses", "rank"]
    assert lines[4:] == ["  stages 0 1 of lane > and stages 1 0 of lane <: outputs and gradients equal"]
    apart = Comparison((every[0], replace(every[1], faults=("w: the gradient is zero",)), *every[2:]), (), ())
    assert [line.partition(":")[0] for line in apart.text().splitlines()[1:]] == [
        "  stage 1 of lane > on rank 1",
        "  stage 0 of lane > and stages 1 0 of lane <",
    ]


def test_the_fork_of_a_rank_uses_none_of_its_connections():
    transport = Transport()
    assert transport.run(lambda: transport.inside)
    transport.alone = True
    with pytest.raises(RuntimeError, match="exchanges tensors with other ranks"):
        transport.run(lambda: None)


@pytest.mark.parametrize(
    ("finals", "expected"),
    [
        (([4, 6, 5, 7], [1, 2, 12, 14]), None),  # the second has the sums of the first as its own
        (([6, 8, 3, 4], [5, 6, 10, 12]), 1.0),
        (([0.6, 0.8, 3, 4], [5, 6, 1.0, 1.2]), 0.1),
        (([0.6, 0.8, 3, 4], [5, 6, 2.0, 2.4]), None),  # two factors
        (([6, 8, 10, 12], [5, 6, 7, 8]), None),  # one replica has all sums, and the other none
        (([6, 8, 10, 12], [6, 8, 10, 12]), None),  # those are no shards
        (([6, 8, 3, 4], [5, 6, 10, 11]), None),
    ],
)
def test_replicas_may_hold_the_sum_of_their_gradients_in_shards(finals, expected):
    owns = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    for by in (1, 2):
        replicas = [{"w": (torch.tensor(final) / by, own)} for final, own in zip(finals, owns, strict=True)]
        found = factor_of_shards(replicas, by)
        assert found == (None if expected is None else pytest.approx(expected))
        assert factor_of_shards(replicas[:1], by) is None
