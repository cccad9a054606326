"""Training steps that the program skips or runs again, as after an overflow, are steps of their own."""

import pytest
import torch
import torch.distributed as dist

from dualpipe.testing import record_ranks
from tests.record.gpipe_ranks import GPipe
from tests.record.two_ranks import train

MICROBATCHES = 2


class Retried(GPipe):
    """Trains with a loss scale; the first attempt overflows, and the second one has a smaller scale.

    With ``look`` the program looks at its gradients before it throws them away.
    """

    look = True
    clip = False

    def __call__(self, rank):
        torch.manual_seed(rank)
        stage = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        for scale in (2.0**127, 2.0**10):
            self.loss_of = lambda y, count, scale=scale: (y - 1).square().mean() / count * scale
            self.train(rank, stage)
            if self.look:
                bad = torch.tensor([float(any(not p.grad.isfinite().all() for p in stage.parameters()))])
                dist.all_reduce(bad, op=dist.ReduceOp.MAX)
            if self.clip:
                torch.nn.utils.clip_grad_norm_(stage.parameters(), 1e30)
            if scale > 2**10:
                optimizer.zero_grad()
        for parameter in stage.parameters():
            parameter.grad /= 2.0**10
        optimizer.step()


def test_the_attempt_that_the_optimizer_uses_is_recorded_and_compared():
    recording = record_ranks(2, Retried(MICROBATCHES), compare=True)
    assert [*recording.schedule.microbatches.values()] == [MICROBATCHES]
    assert recording.notes[0] == "step 2 of 2"
    assert recording.notes[1].startswith("step 1 ends without an optimizer's step: its gradients are thrown away at ")
    comparison = recording.comparison
    assert comparison.verdict == "equal", comparison.text()
    assert comparison.weights.reduction == "mean", "the loss scale is undone"


@pytest.mark.long
def test_an_attempt_that_is_clipped_before_it_is_thrown_away_is_not_the_one_that_is_compared():
    retried = Retried(MICROBATCHES)
    retried.clip = True
    recording = record_ranks(2, retried, compare=True)
    assert recording.notes[0] == "step 2 of 2"
    for each in recording.comparison.chunks:
        assert not each.faults
        assert [text.partition(" between ")[0] for text in each.unknown] == [
            "weight, bias: the program changes the gradient"  # it undoes the scale after the clipping
        ]


@pytest.mark.long
def test_an_attempt_whose_gradients_are_thrown_away_is_unknown():
    recording = record_ranks(2, Retried(MICROBATCHES), compare=True, step=1)
    assert recording.comparison.verdict == "unknown"
    assert "the program threw away the gradients of this step before an optimizer's step" in recording.comparison.text()


@pytest.mark.long
def test_gradients_that_are_set_to_none_without_a_look_are_a_fault():
    retried = Retried(MICROBATCHES)
    retried.look = False
    recording = record_ranks(2, retried, compare=True)
    assert recording.steps == 1
    assert recording.comparison.verdict == "different", recording.comparison.text()


@pytest.mark.long
def test_gradients_that_the_program_adds_up_itself_are_not_thrown_away():
    def body(rank):
        stage = torch.nn.Linear(4, 4)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        sums = [torch.zeros_like(parameter) for parameter in stage.parameters()]
        for _ in range(MICROBATCHES):
            train(rank, stage, microbatches=1)
            print(sum(parameter.grad.norm().item() for parameter in stage.parameters()))
            sums = [total + parameter.grad for total, parameter in zip(sums, stage.parameters(), strict=True)]
            optimizer.zero_grad()
        for total, parameter in zip(sums, stage.parameters(), strict=True):
            parameter.grad = total.detach()
        optimizer.step()

    recording = record_ranks(2, body, compare=True)
    assert recording.steps == 1
    assert recording.comparison.verdict == "equal", recording.comparison.text()
