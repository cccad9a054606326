"""Stages that draw random numbers: from states of their own, in recomputed forwards, and outside of torch."""

import functools
import random
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe.record.child.draws import Draw, Drawn, Draws, _key
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


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_drawn_again_between_modules_belongs_to_none_of_them(reentrant):
    def body(rank):
        torch.manual_seed(rank)
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
        drop = functools.partial(checkpoint, nn.functional.dropout, use_reentrant=reentrant)
        train(rank, lambda x: second(drop(first(x))), 2)
        optimizer.step()

    comparison = record_ranks(2, body, compare=True).comparison
    assert comparison.verdict in ("equal", "unknown"), comparison.text()
    assert "random" not in comparison.text()


def test_a_state_is_set_before_each_draw_and_other_draws_go_on():
    drawn = [Draw(torch.Generator().manual_seed(seed).get_state()) for seed in (1, 2)]
    draws = Draws()
    with draws.plain_run(), draws.given(drawn):
        torch.manual_seed(7)
        again = torch.rand(2), torch.rand(2), torch.rand(2)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), again[0])
    torch.manual_seed(2)
    assert all(map(torch.equal, (torch.rand(2), torch.rand(2)), again[1:]))


def test_a_forward_that_is_computed_again_may_draw_what_its_calls_or_the_program_drew():
    draws = Draws()
    known, elsewhere, other = (torch.tensor([n]) for n in range(3))
    first, second = (
        Drawn([Draw(known)]),
        Drawn(runs={1: [], 3: [Draw(other, "train.py:7")], 2: [Draw(known, "train.py:3")]}),
    )
    draws._elsewhere.add(_key(elsewhere))
    assert second.again() == [Draw(known, "train.py:3")]
    assert Drawn().again() == []
    assert draws.other([first, second]) == "train.py:7"
    assert draws.other([first, Drawn(runs={1: [Draw(known, "a"), Draw(elsewhere, "b")]})]) == ""
    draws.forget()
    assert draws.other([first, Drawn(runs={1: [Draw(known, "a"), Draw(elsewhere, "b")]})]) == "b"
