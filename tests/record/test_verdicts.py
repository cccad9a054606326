"""Right programs of many kinds, which a comparison must not call different, beside wrong ones that look alike."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

from dualpipe.testing import record_ranks
from tests.record.gpipe_ranks import SHAPE, WIDTH, GPipe
from tests.record.two_ranks import receive


def compared(program):
    return record_ranks(2, program, compare=True).comparison


def throw_away(loss, kept):
    kept.append(loss)
    loss.backward()


def keep_with_input(loss, kept):
    kept.append((torch.zeros(SHAPE), loss))
    loss.backward()


def test_a_list_of_two_losses_that_is_thrown_away_is_found():
    comparison = compared(GPipe(2, lose=throw_away))
    assert comparison.verdict == "different"
    assert "2 were computed and collected, and none is kept or read by the end of the step" in comparison.text()


@pytest.mark.long
def test_losses_that_are_kept_beside_larger_tensors_are_not_collected():
    comparison = compared(GPipe(3, lose=keep_with_input))
    assert comparison.verdict == "equal", comparison.text()


def test_other_losses_beside_the_boundary_or_beside_a_module_are_part_of_the_gradient():
    loss_module = nn.MSELoss()

    def two_losses(y, count):
        return loss_module(y, torch.ones_like(y)) / count + 0.1 * y.abs().mean() / count

    def with_auxiliary(y, gradient):
        torch.autograd.backward([y, 0.01 * y.square().mean()], [gradient, None])

    comparison = compared(GPipe(loss_of=two_losses, feed=with_auxiliary))
    assert comparison.verdict == "equal", comparison.text()


class WithSum(nn.Module):
    """Returns its result and something computed from that, and reads one row of a table with a sparse gradient."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(4, 4), nn.Embedding(5, 4, sparse=True)

    def forward(self, x):
        h = self.linear(x) + self.table(torch.zeros(len(x), dtype=torch.long))
        return h, h.square().sum(1)


@pytest.mark.long
def test_an_output_from_which_another_one_is_computed_and_a_sparse_gradient_are_compared():
    program = GPipe(last=WithSum, loss_of=lambda y, count: (y[0].exp().mean() + y[1].mean()) / count)
    comparison = compared(program)
    assert comparison.verdict == "equal", comparison.text()


def clip_or_decay(stage, optimizer):
    """Clips the gradients by value, or adds a weight decay to them if this is the last stage."""
    for parameter in stage.parameters():
        if torch.distributed.get_rank() == 0:
            parameter.grad.clamp_(-0.01, 0.01)
        else:
            parameter.grad.add_(parameter.detach(), alpha=0.1)
    optimizer.step()


@pytest.mark.long
def test_gradients_clipped_by_value_or_with_a_weight_decay_are_explained():
    comparison = compared(GPipe(finish=clip_or_decay))
    assert comparison.verdict == "unknown", comparison.text()
    assert "that of weight of stage 1 on rank 1 is not: are all?" in comparison.text()
    assert "clipped to values up to 0.01" in comparison.text()
    assert "with a weight decay of 0.1, up to rounding" in comparison.text()


@pytest.mark.long
def test_a_first_stage_that_is_not_trained_needs_no_gradient():
    comparison = compared(GPipe(frozen=True))
    assert comparison.verdict == "equal", comparison.text()


@pytest.mark.long
@pytest.mark.parametrize("scale", [2.0**16])
def test_a_gradient_scaler_undoes_its_scale(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)

    def finish(stage, optimizer):
        scaler.scale(torch.zeros(1))  # on the first stage, which has no loss
        scaler.step(optimizer)

    program = GPipe(loss_of=lambda y, count: scaler.scale(mse_loss(y, torch.ones_like(y)) / count), finish=finish)
    comparison = compared(program)
    assert comparison.verdict == "equal", comparison.text()
    assert comparison.weights.reduction == "mean"


def clip_together(stage, optimizer, divided_by=1):
    """Clips all gradients together to a norm of 0.01, without torch's function."""
    gradients = [parameter.grad for parameter in stage.parameters()]
    torch._foreach_div_(gradients, divided_by)
    squares = sum(norm.square() for norm in torch._foreach_norm(gradients))
    torch.distributed.all_reduce(squares)
    torch._foreach_mul_(gradients, 0.01 / squares.sqrt().item())
    optimizer.step()


@pytest.mark.long
def test_a_limit_of_the_norm_may_be_given_for_a_program_that_clips_itself():
    recording = record_ranks(2, GPipe(finish=clip_together), compare=True, clip_norm=0.01, name="clipped")
    assert recording.comparison.verdict == "equal", recording.comparison.text()
    assert recording.schedule.name == "clipped"
    assert recording.comparison.weights.reduction == "mean", "the clipping does not count"


@pytest.mark.long
def test_a_division_before_the_clipping_is_no_part_of_it():
    halved = GPipe(finish=partial(clip_together, divided_by=2))
    comparison = record_ranks(2, halved, compare=True, clip_norm=0.01, reduction="mean").comparison
    assert comparison.verdict == "unknown", "the sum and the mean are clipped to the same gradient"
    assert "is each loss divided by 3, and the gradient by 2 once more? One is scaled at " in comparison.text()


def finish_by(change):
    def finish(stage, optimizer):
        change(stage)
        optimizer.step()

    return GPipe(finish=finish)


@pytest.mark.parametrize(
    ("change", "verdict", "says"),
    [
        (lambda stage: nn.utils.clip_grad_value_(stage.parameters(), 0.01), "equal", "clipped to values up to 0.01"),
        (
            lambda stage: nn.utils.clip_grad_value_(stage.parameters(), 0.01) if dist.get_rank() else None,
            "unknown",
            "gradients are clipped to values up to 0.01, and that of weight of stage 0 on rank 0 is not: are all?",
        ),
        (
            lambda stage: (nn.utils.clip_grad_norm_(stage.parameters(), 1e3), stage.bias.grad.zero_()),
            "unknown",
            "bias: the program changes the gradient between clip_grad_norm_ at ",
        ),
        (
            lambda stage: (nn.utils.clip_grad_norm_(stage.parameters(), float("inf")), stage.bias.grad.zero_()),
            "different",
            "bias: the gradient is zero, but not in the plain run",
        ),
    ],
)
def test_what_the_program_does_to_gradients_beside_clipping_is_seen(change, verdict, says):
    comparison = record_ranks(2, finish_by(change), compare=True).comparison
    assert comparison.verdict == verdict, comparison.text()
    assert says in comparison.text()


class OwnInputGradient(torch.autograd.Function):
    """A linear layer that keeps the gradient of its input itself, and gives autograd none."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.leaf = x
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        ctx.leaf.grad = gradient @ weight
        return None, gradient.T @ x


class KeepsInputGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return OwnInputGradient.apply(x, self.weight)


def test_a_function_that_gives_its_input_no_gradient_runs_as_without_the_recorder():
    comparison = compared(GPipe(last=KeepsInputGradient))
    assert comparison.verdict == "equal", comparison.text()


class Recomputed(GPipe):
    """Forwards keep no graph; each backward computes its forward again."""

    def train(self, rank, stage):
        inputs = []
        for _ in range(self.microbatches):
            inputs.append(receive(0) if rank else torch.randn(SHAPE))
            with torch.no_grad():
                y = stage(inputs[-1])
            if rank == 0:
                dist.send(y, 1)
        for x in inputs:
            y = stage(x.requires_grad_())
            if rank:
                self.loss_of(y, self.microbatches).backward()
                dist.send(x.grad, 0)
            else:
                y.backward(receive(1))


def test_a_forward_that_is_computed_again_by_hand_has_the_gradients_of_that_run():
    comparison = compared(Recomputed())
    assert comparison.verdict == "equal", comparison.text()
