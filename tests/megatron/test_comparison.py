"""The comparison with the ground truth finds every single fault, and reports what, where and by how much."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.testing.launch import launch
from reference.megatron import truth
from reference.megatron.case import Case
from reference.megatron.comparison import differences, failed_sanity_checks, tensors_compared
from reference.megatron.trace import Microbatch, Shard, merge

CASE = Case(steps=2, microbatches=4, dtype="bf16")
SOME = Shard(replica=1, stage=0, tp=0)


@cache
def recorded():
    return merge(launch(truth.ranks(CASE), lambda context: truth.run_rank(CASE, context)).values())


@pytest.fixture
def trace():
    """A trace equal to the truth's, for a test to change."""
    return copy.deepcopy(recorded())


def described(trace) -> list[str]:
    return [str(difference) for difference in differences(CASE, recorded(), trace)]


def test_the_truth_equals_itself(trace):
    assert described(trace) == []
    assert failed_sanity_checks(CASE, trace) == []


def test_every_replica_stage_and_microbatch_is_recorded():
    step = recorded()[0]
    shards = {Shard(replica, stage, 0) for replica in (0, 1) for stage in (0, 1)}
    assert shards == step.gradients.keys() == step.weights.keys() == step.main_weights.keys() == step.norms.keys()
    assert step.losses.keys() == {Microbatch(replica, number) for replica in (0, 1) for number in (0, 1)}
    parameters = sum(map(len, step.weights.values()))
    assert tensors_compared([step]) == 4 + 3 * parameters


@pytest.mark.parametrize("kind", ["gradients", "weights", "main_weights"])
def test_a_number_that_is_one_unit_in_the_last_place_too_large(trace, kind):
    tensor = getattr(trace[1], kind)[SOME]["decoder.layers.1.mlp.linear_fc1.weight"]
    number = tensor.view(-1)[7]
    tensor.view(-1)[7] = torch.nextafter(number, torch.full_like(number, 9.0))
    what = kind.replace("_", " ").removesuffix("s")
    assert described(trace)[0] == (
        f"step 1, stage 0: {what} of decoder.layers.1.mlp.linear_fc1.weight (replica 1, tensor rank 0) differs, "
        "by up to 1 units in the last place"
    )


def test_a_loss_that_was_not_returned(trace):
    del trace[0].losses[Microbatch(1, 1)]
    assert described(trace) == ["step 0, stage 1: loss of microbatch 1 of replica 1 is missing"]


def test_a_loss_that_was_returned_twice(trace):
    trace[0].losses[Microbatch(0, 0)] *= 2
    assert described(trace) == ["step 0, stage 1: loss of microbatch 0 of replica 0 was returned 2 times"]


def test_losses_of_two_microbatches_exchanged(trace):
    losses = trace[0].losses
    losses[Microbatch(0, 0)], losses[Microbatch(0, 1)] = losses[Microbatch(0, 1)], losses[Microbatch(0, 0)]
    assert len(described(trace)) == 2


def test_a_replica_that_differs_is_reported_apart_from_being_wrong(trace):
    trace[0].weights[SOME]["embedding.word_embeddings.weight"].neg_()
    first, second = described(trace)
    assert "weight of embedding.word_embeddings.weight (replica 1" in first
    assert "weight against the first replica's of embedding.word_embeddings.weight (replica 1" in second


def test_a_parameter_that_is_missing(trace):
    del trace[0].gradients[SOME]["embedding.word_embeddings.weight"]
    assert described(trace) == [
        "step 0, stage 0: gradient of embedding.word_embeddings.weight (replica 1, tensor rank 0) is missing"
    ]


def test_a_norm_of_one_rank_in_the_last_digit(trace):
    trace[0].norms[SOME] *= 1 + 2**-50
    first, second = described(trace)
    assert first.startswith("step 0, stage 0: gradient norm of replica 1, stage 0, tensor rank 0 is ")
    assert second == "step 0, stage 0: gradient norm of all ranks is not one number"


def test_the_oracles_norm_may_differ_from_a_sharded_one_by_rounding_only(trace):
    sharded = Case(steps=2, microbatches=4, dtype="bf16", distributed_optimizer=True)
    assert CASE.norm_rounding == 0
    for step in trace:
        step.norms = {shard: norm * (1 + 2**-23) for shard, norm in step.norms.items()}
    assert differences(sharded, recorded(), trace, norm_rounding=sharded.norm_rounding) == []
    assert len(differences(sharded, recorded(), trace)) == 2 * 4
    for step in trace:
        step.norms = {shard: norm * (1 + 2**-20) for shard, norm in step.norms.items()}
    assert len(differences(sharded, recorded(), trace, norm_rounding=sharded.norm_rounding)) == 2 * 4


def test_an_optimizer_that_made_no_step(trace):
    trace[1].done[SOME] = False
    assert described(trace) == ["step 1, stage 0: optimizer's step of replica 1, stage 0, tensor rank 0 was not made"]


def test_a_gradient_that_is_zero_or_not_finite_fails_the_sanity_checks(trace):
    gradients = trace[1].gradients[SOME]
    gradients["embedding.word_embeddings.weight"].zero_()
    gradients["embedding.position_embeddings.weight"].fill_(torch.nan)
    assert failed_sanity_checks(CASE, trace) == [
        f"step 1, {SOME}: the gradient of embedding.word_embeddings.weight is zero",
        f"step 1, {SOME}: the gradient of embedding.position_embeddings.weight is not finite",
    ]


def test_losses_and_weights_that_do_not_change_fail_the_sanity_checks(trace):
    trace[1].losses = trace[0].losses
    trace[1].weights = trace[0].weights
    complaints = failed_sanity_checks(CASE, trace)
    assert complaints[0] == "step 1: the loss did not change"
    assert complaints[1].endswith("did not change")
