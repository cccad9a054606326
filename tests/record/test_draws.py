"""Stages that draw random numbers: from states of their own, in recomputed forwards, and outside of torch."""

import random
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe.record.child.draws import Draw, Drawn, Draws
from dualpipe.testing import record_ranks
from tests.record.two_ranks import train


class Tracker:
    """A second stream of random numbers, to which the default generator is switched and back, as in Megatron."""

    def __init__(self):
        self.state = torch.Generator().manual_seed(5).get_state()

    @contextmanager
    def fork(self):
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.state)
        yield
        self.state = torch.default_generator.get_state()
        torch.default_generator.set_state(before)


class Stage(nn.Module):
    """Dropout from the tracker, in a forward that is computed again, beside other random numbers."""

    def __init__(self, recompute):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tracker, self.own, self.recompute = Tracker(), torch.Generator().manual_seed(1), recompute

    def forward(self, x):
        # the function that is computed again starts with the tracker's state of the forward, as in Megatron
        state = self.tracker.state
        y = checkpoint(self.dropped, x, state, use_reentrant=False) if self.recompute else self.dropped(x, state)
        noise = torch.rand(4, generator=self.own) + random.random()
        return nn.functional.dropout(self.second(y), 0.2) + noise

    def dropped(self, x, state):
        later, self.tracker.state = self.tracker.state, state
        with self.tracker.fork():
            y = nn.functional.dropout(torch.tanh(self.first(x)), 0.4)
        if later is not state:
            self.tracker.state = later
        return y


@pytest.mark.parametrize("recompute", [False, True])
def test_a_plain_run_draws_the_same_numbers_as_the_program(recompute):
    def body(rank):
        torch.manual_seed(rank)
        random.seed(rank)
        stage = Stage(recompute)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        train(rank, stage, 3)
        optimizer.step()

    comparison = record_ranks(2, body, compare=True).comparison
    assert comparison.verdict == "equal", comparison.text()


class Forgets(nn.Module):
    """A dropout that is computed again, with the random state at the time of the backward."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(checkpoint(self.dropout, x, use_reentrant=False, preserve_rng_state=False))


def test_a_forward_that_is_computed_again_with_other_random_numbers_is_different():
    def body(rank):
        torch.manual_seed(rank)
        stage = Forgets()
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        train(rank, lambda x: stage(x.requires_grad_()), 2)
        optimizer.step()

    comparison = record_ranks(2, body, compare=True).comparison
    assert comparison.verdict == "different", comparison.text()
    assert "computed again in the backward, with other random numbers than in its forward, at " in comparison.text()


def test_a_state_is_set_before_each_draw_and_other_draws_go_on():
    draws, drawn = Draws(), []
    with draws.kept(drawn):
        first = torch.rand(2), torch.rand(2)
        with draws.engine_run():  # within a call: neither counted twice nor taken for another call's
            second = torch.rand(2)
    assert len(drawn) == 3
    with draws.given(drawn):
        torch.manual_seed(7)
        again = torch.rand(2), torch.rand(2), torch.rand(2), torch.rand(2)
    assert all(map(torch.equal, (*first, second), again))
    assert not torch.equal(again[3], second)


def test_the_first_run_of_the_engine_that_draws_counts_and_draws_again_as_the_forward_did():
    first, second = Draw(torch.tensor(2)), Draw(torch.tensor(3), "train.py:7")
    drawn = Drawn([first], {3: [second], 1: [], 2: [first]})
    assert drawn.again() == [first]
    assert Drawn().again() == []
    assert (drawn.other(), Drawn([first, second], drawn.runs).other()) == ("train.py:7", "")
