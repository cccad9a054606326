"""Every fault planted in the Megatron drop-in is found, and the message says what is wrong."""

from __future__ import annotations

from functools import cache

import pytest

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.testing.launch import launch
from reference.megatron import production, truth
from reference.megatron.comparison import differences
from reference.megatron.trace import merge
from tests.megatron.faults import BASE, FAULTS


@cache
def the_truth(case):
    return merge(launch(truth.ranks(case), lambda context: truth.run_rank(case, context), case.limit).values())


def complaint(case, plant=lambda: None) -> str:
    """The first failure or difference of production with a planted fault; empty if it is equal."""

    def body(context):
        plant()
        return production.run_rank(case, context)

    outcome = launch(production.ranks(case), body, case.limit)
    if outcome.failures:
        return str(outcome.failures[0])
    return next(map(str, differences(case, the_truth(case), merge(outcome.values()))), "")


def test_without_a_fault_production_equals_the_truth():
    assert complaint(BASE) == ""


def split_gradients(plant=lambda: None) -> list[list[int]]:
    """For each rank, the number of weight gradients that each B of a run left to its W."""

    def body(context):
        from dualpipe.runtime.weightgrad import DeferredGradients

        real, counts = DeferredGradients.run, []
        DeferredGradients.run = lambda self, key: (counts.append(self.count(key)), real(self, key))
        plant()
        production.run_rank(BASE, context)
        return counts

    return launch(production.ranks(BASE), body, BASE.limit).values()


def test_b_leaves_every_linear_layer_of_a_stage_to_w():
    layers_per_stage = BASE.layers // BASE.pp
    linear = 4 * layers_per_stage  # qkv, projection, fc1, fc2
    for counts in split_gradients():
        assert counts.count(0) <= 2  # the first microbatch of each of the two stages is run whole
        assert {*counts} - {0} <= {linear, linear + 1}  # the last stage has the output layer as well
        assert any(counts)


def test_35_a_store_that_stays_empty_is_found_as_w_has_nothing_to_do():
    """Gradients are right even if nothing is split, so the comparison cannot find this fault."""

    def plant():
        from dualpipe.megatron import model
        from dualpipe.megatron.layers import Split
        from dualpipe.runtime.split_stage import SplitStage

        model.split_layers = lambda module, store, name: Split(SplitStage(name, (), store), ())

    assert {count for counts in split_gradients(plant) for count in counts} == {0}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_found_by_what_it_does(fault):
    message = complaint(fault.case, fault.plant)
    assert fault.matches(message), message or "nothing was found"
