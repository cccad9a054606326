"""The oracle compared with sums done by hand and with a training loop that shares no code with it."""

import copy
from functools import partial

import torch
from torch import nn

from dualpipe.schedule.generate import dualpipe
from reference import oracle
from reference.data import Batch
from tests.reference.trials import ADAM, SGD, decoder, same


def test_a_line_through_two_points_by_hand():
    # y = 3x + 1, loss (y - t)^2:  (x, t) = (2, 1) errs by 6, (1, 6) by -2;  dw = 2 e x,  db = 2 e
    line = nn.Linear(1, 1)
    with torch.no_grad():
        line.weight.fill_(3)
        line.bias.fill_(1)
    lanes = [[Batch(torch.tensor([[x]]), torch.tensor([[t]]))] for x, t in ((2.0, 1.0), (1.0, 6.0))]
    (step,) = oracle.train([line], [lanes], nn.functional.mse_loss, SGD)
    assert [[float(loss) for loss in lane] for lane in step.losses] == [[36], [4]]
    by_lane = [(float(stage["weight"]), float(stage["bias"])) for (stage,) in step.lane_gradients]
    assert by_lane == [(24, 12), (-4, -4)]
    assert (float(step.gradients[0]["weight"]), float(step.gradients[0]["bias"])) == (20, 8)
    assert (float(step.weights[0]["weight"]), float(step.weights[0]["bias"])) == (3 - 0.5 * 20, 1 - 0.5 * 8)
    assert line.weight.item() == 3  # the module passed in is not changed


def test_one_lane_is_the_ordinary_training_loop():
    trial = decoder(dualpipe(2, 4), steps=3)
    data = [[[batch for lane in step for batch in lane]] for step in trial.data]
    model = nn.Sequential(*copy.deepcopy(trial.stages))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for (batches,), step in zip(data, oracle.train(trial.stages, data, trial.criterion, ADAM), strict=True):
        optimizer.zero_grad()
        for batch, expected in zip(batches, step.losses[0], strict=True):
            loss = trial.criterion(model(batch.tokens), batch.targets)
            loss.backward()
            assert torch.equal(loss, expected)
        for number, stage in enumerate(model):
            assert same({name: p.grad for name, p in stage.named_parameters()}, step.gradients[number])
            assert same(step.gradients[number], step.lane_gradients[0][number])
        optimizer.step()
        for number, stage in enumerate(model):
            assert same(dict(stage.named_parameters()), step.weights[number])


def test_the_sum_of_two_lanes_is_not_bitwise_one_pass_over_all_microbatches():
    trial = decoder(dualpipe(2, 8), steps=1)
    one_pass = [[[batch for lane in trial.data[0] for batch in lane]]]
    (lanes,) = trial.truth()
    (plain,) = oracle.train(trial.stages, one_pass, trial.criterion, ADAM)
    for stage in range(2):
        first, second = (lane[stage] for lane in lanes.lane_gradients)
        assert same({name: first[name] + second[name] for name in first}, lanes.gradients[stage])
        for name, gradient in plain.gradients[stage].items():
            # tolerance: eight numbers of about 1e-2 added in another order, in fp32
            torch.testing.assert_close(lanes.gradients[stage][name], gradient, rtol=1e-4, atol=1e-6)
    differ = [n for s in range(2) for n, g in plain.gradients[s].items() if not torch.equal(g, lanes.gradients[s][n])]
    assert differ


def test_the_loss_falls_and_every_gradient_is_finite_and_not_zero():
    trial = decoder(dualpipe(2, 8), steps=8)
    steps = trial.truth()
    means = [float(sum(loss for lane in step.losses for loss in lane)) for step in steps]
    assert means[-1] < means[0] - 1
    for step in steps:
        for gradients in step.gradients:
            assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())


def test_a_parameter_without_a_gradient_is_left_out_and_not_changed():
    stage = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    stage[1].requires_grad_(False)
    stage.register_parameter("spare", nn.Parameter(torch.ones(2)))
    batch = Batch(torch.ones(1, 2), torch.zeros(1, 2))
    (step,) = oracle.train([stage], [[[batch]]], nn.functional.mse_loss, partial(torch.optim.AdamW, weight_decay=0.5))
    assert set(step.gradients[0]) == {"0.weight", "0.bias"}
    assert torch.equal(step.weights[0]["spare"], torch.ones(2))


def test_a_result_is_not_changed_by_the_next_step():
    trial = decoder(dualpipe(2, 4), steps=2)
    steps = oracle.train(trial.stages, trial.data, trial.criterion, ADAM)
    first = next(steps)
    kept = copy.deepcopy(first)
    next(steps)
    for stage in range(2):
        assert same(first.weights[stage], kept.weights[stage])
        assert same(first.gradients[stage], kept.gradients[stage])
