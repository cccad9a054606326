"""With which weight each loss enters the gradient: its mean over the microbatches, their sum, or neither."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from dualpipe.errors import RuleError
from dualpipe.record.child.weights import Weight
from dualpipe.record.comparison import ChunkComparison, LossWeights, check_expected
from dualpipe.record.plain.factors import Lasts, _reduction, factors, uneven, weights_of
from dualpipe.schedule import DOWN, UP, Chunk
from dualpipe.testing import record_ranks
from tests.record.gpipe_ranks import GPipe

M = 8
ELEMENTS = 12


class Scaled(torch.autograd.Function):
    """Divides the gradient where autograd's graph does not show it."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / M


def target(y):
    return torch.ones_like(y)


def masked(y):
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0]).expand_as(y)
    return (mse_loss(y, target(y), reduction="none") * mask).sum() / mask.sum()


LOSSES = {
    "mean of a loss over its microbatches": (lambda y: mse_loss(y, target(y)) / M, "mean"),
    "mean, by hand": (lambda y: y.square().sum() * (1 / ELEMENTS) / M, "mean"),
    "mean over all tokens": (lambda y: mse_loss(y, target(y), reduction="none").sum() / (M * ELEMENTS), "mean"),
    "mean over the tokens of a mask": (lambda y: masked(y) / M, "mean"),
    "elements divided one by one": (lambda y: (mse_loss(y, target(y), reduction="none") / M).mean(), "mean"),
    "mean of two losses": (lambda y: (mse_loss(y, target(y)) + y.abs().mean()) / M, "mean"),
    "negative logarithm": (lambda y: -y.softmax(-1).log().mean() / M, "mean"),
    "sum": (lambda y: mse_loss(y, target(y)), "sum"),
    "sum of sums": (lambda y: y.square().sum(), "sum"),
    "sum of masked means": (masked, "sum"),
    "sum of classes": (lambda y: cross_entropy(y, torch.zeros(3, dtype=torch.long)), "sum"),
    "neither": (lambda y: mse_loss(y, target(y)) / 5, "other"),
    "two losses, each divided": (lambda y: mse_loss(y, target(y)) / M + y.abs().mean() / M, ""),
    "a function of the program": (lambda y: Scaled.apply(mse_loss(y, target(y))), ""),
    "a function of the program, and a mean": (lambda y: Scaled.apply(mse_loss(y, target(y))) / M, "mean"),
}


@pytest.mark.parametrize(
    ("weights", "verdicts", "question"),
    [
        ({UP: (0.2,) * 5, DOWN: (0.2,) * 5}, ("different", ""), "the microbatches of its own lane, and not of both?"),
        ({UP: (1 / 11,) * 5, DOWN: (1 / 11,) * 5}, ("different", ""), "is each loss divided by 11?"),
        (
            {UP: (0.25, 1.0, 0.25, 0.25)},
            ("different", "unknown"),
            "1 for microbatch 1 of lane >, and 0.25 for most others",
        ),
        ({UP: (0.7,) * 4}, ("unknown", ""), "so it is not known whether the gradient is the mean"),
        ({UP: (0.2, 0.3, 0.4, 0.5)}, ("unknown", ""), "so it is not known whether the gradient is the mean"),
    ],
)
def test_weights_that_are_neither_a_mean_nor_a_sum(weights, verdicts, question):
    """As of losses of which each has the number of its own tokens."""
    expected = LossWeights(weights, "other", "mean", True)
    found = LossWeights(weights, "other", None, True)
    for each, verdict in ((expected, verdicts[0]), (found, verdicts[1])):
        assert (bool(each.faults), bool(each.unknown)) == (verdict == "different", verdict == "unknown")
        assert question in each.text() or not verdict


@pytest.mark.parametrize("loss", LOSSES)
def test_a_graph_shows_the_weight_of_its_loss_or_leaves_it_open(loss):
    loss_of, expected = LOSSES[loss]
    root = loss_of(nn.Linear(4, 4)(torch.randn(3, 4)))
    weight = Weight(root)
    assert weight.found() is None
    root.backward()
    assert _reduction([weight.found()] * M, 1.0) == expected, weight.found()


def test_a_seed_is_part_of_the_weight_and_a_second_run_leaves_it_open():
    root = mse_loss(nn.Linear(4, 4)(torch.randn(3, 4)), torch.ones(3, 4))
    weight = Weight.of(root, partial=False)
    root.backward(torch.tensor(1 / M), retain_graph=True)
    assert _reduction([weight.found()] * M, 1.0) == "mean"
    assert Weight.of(root, partial=False) is None
    root.backward(torch.tensor(1.0))
    assert not weight.found()["certain"]
    assert _reduction([weight.found()] * M, 1.0) == ""


@pytest.mark.parametrize(
    ("reduction", "expected", "fault", "unknown"),
    [
        ("sum", "mean", True, False),
        ("mean", "sum", True, False),
        ("mean", "mean", False, False),
        ("other", "mean", False, True),
        ("", "sum", False, True),
        ("sum", None, False, False),
    ],
)
def test_what_is_expected_of_the_weights_and_not_the_case_is_a_fault_or_unknown(reduction, expected, fault, unknown):
    weights = LossWeights({UP: (0.7,) * 4}, reduction, expected)
    assert (bool(weights.faults), bool(weights.unknown)) == (fault, unknown)
    assert LossWeights({UP: (1.0,)}, reduction, expected).faults == (), "the mean of one is its sum"


def test_a_loss_that_is_not_divided_is_a_sum_and_different_if_a_mean_is_expected():
    summed = GPipe(loss_of=lambda y, count: mse_loss(y, target(y)))
    comparison = record_ranks(2, summed, compare=True, reduction="mean").comparison
    assert comparison.verdict == "different"
    assert comparison.text().splitlines()[1] == (
        "  each loss enters the gradient with weight 1: the gradient is the sum over 3 microbatches, and not the mean: "
        "is each loss divided by their number?"
    )
    assert comparison.as_json()["loss_weights"]["reduction"] == "sum"
    assert comparison.as_json()["loss_weights"]["weights"] == {">": [1.0] * 3}


@pytest.mark.long
def test_gradients_that_are_divided_as_well_as_the_losses_are_divided_twice():
    def finish(stage, optimizer):
        torch._foreach_mul_([parameter.grad for parameter in stage.parameters()], 1 / 3)
        optimizer.step()

    comparison = record_ranks(2, GPipe(finish=finish), compare=True).comparison
    assert comparison.verdict == "different"
    assert "each loss is divided by 3 before its backward, and the gradients are divided by 3 once more" in (
        comparison.text()
    )


def test_the_weights_of_all_pipelines_over_which_gradients_are_summed_count():
    one = {"whole": 1 / 2, "mean": 1 / 2, "certain": 1.0}  # of two microbatches in each of two pipelines
    own, other = (Lasts({UP: (one, one)}) for _ in range(2))
    averaged = [ChunkComparison(Chunk(UP, 0), 0, 2, (), (), (), divided_by=2, factor=1 / 2, pipelines=2)]
    assert weights_of(own, [other], averaged, reduced=False).reduction == "mean"
    added = [ChunkComparison(Chunk(UP, 0), 0, 2, (), (), (), factor=1.0, pipelines=2)]
    assert weights_of(own, [other], added, reduced=False).reduction == "other"
    alone = [ChunkComparison(Chunk(UP, 0), 0, 2, (), (), (), factor=1.0)]
    assert weights_of(own, [other], alone, reduced=True).reduction == "mean"
    assert weights_of(own, [other], alone, reduced=False).reduction == "", "they may be reduced later"
    assert weights_of(Lasts({UP: (one, None)}), [], alone, reduced=True).reduction == ""


def test_gradients_that_may_be_clipped_leave_the_weight_open():
    one = {"whole": 1 / 2, "mean": 1 / 2, "certain": 1.0}
    scaled = [ChunkComparison(Chunk(UP, 0), 0, 2, (), (), (), scale=0.3, factor=0.3)]
    assert weights_of(Lasts({UP: (one, one)}), [], scaled, reduced=True) == LossWeights({}, "", None)


def test_a_division_that_clipping_hides_is_part_of_the_weight_if_the_norm_shows_it():
    losses = Lasts({UP: ({"whole": 1 / 2, "mean": 1 / 2, "certain": 1.0},) * 2})
    scaled = [ChunkComparison(Chunk(UP, 0), 0, 2, (), (), (), scale=0.2, factor=0.2)]
    weigh = partial(weights_of, losses, [], scaled, True, "mean")
    assert (weigh(0.2).reduction, weigh(0.2).faults) == ("mean", ())
    (found,) = weigh(0.4).unknown  # by 1/2, and then clipped: the same as the mean, clipped
    assert "over 2 microbatches: is each loss divided by 2, and the gradient by 2 once more?; but" in found
    assert not weigh(0.4).faults
    (unknown,) = weigh(None).unknown
    assert "was not found among the values of every rank; so it is not known whether" in unknown


def stages(*pairs):
    return [ChunkComparison(Chunk(UP, n), n, 4, (), (), (), factor=f, taken=t) for n, (f, t) in enumerate(pairs)]


def test_a_scale_of_one_lane_is_that_of_one_chunk_of_each_rank():
    found = {Chunk(lane, stage): factor for lane, factor in ((UP, 0.2), (DOWN, 1.0)) for stage in range(2)}
    assert uneven(found).endswith(
        ": by 1 in lane < and by 0.2 in lane >. Is only one chunk of each rank scaled or clipped?"
    )


def test_a_scale_of_a_message_counts_for_all_stages_before_it():
    assert factors(stages((1.0, 0.25), (0.25, 1.0))) == {Chunk(UP, 0): 0.25, Chunk(UP, 1): 0.25}
    assert not uneven(factors(stages((1.0, 0.25), (0.25, 1.0))))
    assert not uneven(factors(stages((None, 1.0), (0.25, 1.0)))), "no gradient of stage 0 shows a factor"
    assert not uneven(factors(stages((1.0, None), (0.25, 1.0)))), "what stage 0 takes is unknown"
    assert uneven(factors(stages((1.0, 1.0), (1.0, 0.5), (1.0, 1.0)))).startswith(
        "with respect to the losses the gradients are scaled differently: by 0.5 at stages 0 1 and by 1 at stage 2"
    )


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((False, 1.0, None), "clip norm is for a comparison"),
        ((False, None, "sum"), "reduction is for a comparison"),
        ((True, 0.0, None), "a positive number"),
        ((True, None, "average"), "mean or sum"),
    ],
)
def test_what_is_expected_is_checked(given, says):
    with pytest.raises(RuleError, match=says):
        check_expected(*given)
