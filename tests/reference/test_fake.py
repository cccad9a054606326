"""Fake ranks compute the oracle's bits for every schedule and dtype, blocking or not, in any order of moves."""

import pytest
import torch
from torch import nn

from dualpipe.schedule import SENDS
from dualpipe.schedule.generate import PLANS, dualpipe, generate
from dualpipe.schedule.text import loads
from reference.data import Batch
from reference.fault import SetupError
from reference.ledger import Ledger
from tests.reference.trials import SGD, Trial, change_slot, decoder, matches, toy

SIZES = [(name, 2) for name in PLANS] + [(name, 4) for name in PLANS if "-late-" not in name]
SIZES += [("1f1b", 3), ("zb1p", 3), ("interleaved", 2), ("zbv", 2), ("zbv", 3)]
TRIALS = [(name, ranks, torch.float32) for name, ranks in SIZES]
TRIALS += [("dualpipe", 2, torch.bfloat16), ("zb1p", 2, torch.bfloat16), ("dualpipe", 2, torch.float64)]
TRIALS += [pytest.param(name, 4, torch.float32, marks=pytest.mark.long) for name in PLANS if "-late-" in name]


@pytest.mark.parametrize(("name", "ranks", "dtype"), TRIALS)
def test_every_schedule_trains_to_the_oracles_bits(name, ranks, dtype):
    schedule = generate(name, ranks, 2 * ranks)
    trial = decoder(schedule, dtype)
    truth = trial.truth()
    assert matches(schedule, truth, trial.run(schedule))
    assert matches(schedule, truth, trial.run(schedule, blocking=True, seed=1, ledger=Ledger(ranks)))


@pytest.mark.parametrize("name", PLANS)
def test_an_odd_number_of_microbatches_in_each_lane(name):
    schedule = generate(name, 2, 10)
    trial = decoder(schedule, steps=3)
    assert matches(schedule, trial.truth(), trial.run(schedule))


def test_the_bits_do_not_depend_on_which_rank_moves_next():
    schedule = dualpipe(4, 12)
    trial = decoder(schedule, steps=1)
    truth = trial.truth()
    orders = set()
    for seed in range(6):
        seen = []
        assert matches(schedule, truth, trial.run(schedule, seed=seed, observe=lambda op, module: seen.append(op)))  # noqa: B023 - called at once
        orders.add(tuple(seen))
    assert len(orders) == 6  # the seeds chose different orders


def test_a_single_rank_needs_no_messages():
    schedule = loads("lane > 0\nrank 0: 0F0> 0B0>+0W0> 0F1> 0B1> 0W1>")
    trial = decoder(schedule)
    assert matches(schedule, trial.truth(), trial.run(schedule))


def test_neighbour_stages_on_one_rank_pass_tensors_directly():
    schedule = loads("lane > 0 0\nrank 0: 0F0> 1F0> 0F1> 1B0>+1W0> 1F1> 0B0> 1B1> 0B1> 0W0> 1W1> 0W1>")
    trial = decoder(schedule)
    assert matches(schedule, trial.truth(), trial.run(schedule))


def test_a_rank_may_have_nothing_to_do():
    schedule = loads("lane > 0 2\nrank 0: 0F0> 0SF0> 0RB0> 0B0>+0W0>\nrank 1:\nrank 2: 1RF0> 1F0> 1B0>+1W0> 1SB0>")
    trial = decoder(schedule)
    assert matches(schedule, trial.truth(), trial.run(schedule))


def test_the_stages_passed_in_are_not_changed():
    schedule = dualpipe(2, 4)
    trial = toy(schedule)
    trial.run(schedule)
    assert all(p.grad is None for stage in trial.stages for p in stage.parameters())
    assert not any(layer._forward_hooks for stage in trial.stages for layer in stage.modules())


def test_the_two_replicas_differ_before_the_sum_and_agree_after_it():
    schedule = dualpipe(2, 4)
    (step,) = decoder(schedule, steps=1).run(schedule)
    up, down = schedule.lanes
    name = "block0.mlp.0.weight"
    assert not torch.equal(step.lane_gradients[up, 1][name], step.lane_gradients[down, 1][name])
    assert torch.equal(step.gradients[up, 1][name], step.gradients[down, 1][name])
    assert torch.equal(step.weights[up, 1][name], step.weights[down, 1][name])


def test_swapping_two_sends_of_one_slot_trains_silently_on_garbage():
    #   rank 0  SF SB        rank 0  SB SF     both go to rank 1, which takes the first for
    #   rank 1  RF RB        rank 1  RF RB     an activation and the second for a gradient
    schedule = dualpipe(4, 8)
    rank, number, slot = next(
        (rank, number, slot)
        for rank, program in enumerate(schedule.programs)
        for number, slot in enumerate(program)
        if len({schedule.peer(op) for op in slot if op.kind in SENDS}) < sum(op.kind in SENDS for op in slot)
    )
    first, second = [position for position, op in enumerate(slot) if op.kind in SENDS]
    swapped = list(slot)
    swapped[first], swapped[second] = slot[second], slot[first]
    trial = decoder(schedule, steps=1)
    found = trial.run(change_slot(schedule, rank, number, tuple(swapped)))
    assert not matches(schedule, trial.truth(), found)


class Reuse(nn.Module):
    """One linear layer called three times, one that is not called, and one whose result is not used."""

    def __init__(self):
        super().__init__()
        self.again, self.idle, self.lost = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.bare = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        self.lost(x)
        return self.bare(self.again(self.again(x).tanh()) * self.again(x))


class Tied(nn.Module):
    """Two linear layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(self.one(x).tanh())


class Frozen(nn.Module):
    """A frozen linear layer before one with a frozen bias."""

    def __init__(self):
        super().__init__()
        self.fixed, self.trained = nn.Linear(4, 4), nn.Linear(4, 4)
        self.fixed.requires_grad_(False)
        self.trained.bias.requires_grad_(False)

    def forward(self, x):
        return self.trained(self.fixed(x))


class View(nn.Module):
    """A stage whose output is a transposed view."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).transpose(0, 1)


@pytest.mark.parametrize("kind", [Reuse, Tied, Frozen, View])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_unusual_modules_train_to_the_oracles_bits_at_every_stage(kind, stage):
    schedule = generate("dualpipev", 2, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(4)]
        stages[stage] = kind()
        data = [[[Batch(torch.randn(4, 4), torch.randn(4, 4)) for _ in range(4)]] for _ in range(2)]
    trial = Trial(stages, data, nn.functional.mse_loss, SGD)
    assert matches(schedule, trial.truth(), trial.run(schedule))


def test_a_linear_layer_tied_to_an_embedding_is_rejected():
    schedule = loads("lane > 0\nrank 0: 0F0> 0B0>+0W0>")
    stage = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    stage[1].weight = stage[0].weight
    batch = Batch(torch.tensor([1, 2]), torch.zeros(2, 4))
    with pytest.raises(SetupError, match="of a Embedding is also a linear layer's"):
        Trial([stage], [[[batch]]], nn.functional.mse_loss, SGD).run(schedule)


def test_stages_and_data_must_fit_the_schedule():
    schedule = dualpipe(2, 4)
    trial = toy(schedule)
    with pytest.raises(SetupError, match="got 1 for 2"):
        Trial(trial.stages[:1], trial.data, trial.criterion).run(schedule)
    with pytest.raises(SetupError, match="step 0 has 1 for 2"):
        Trial(trial.stages, [trial.data[0][:1]], trial.criterion).run(schedule)
