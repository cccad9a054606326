"""Links between stages in a comparison: gradients of several losses, and gradients that a residual passes on."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record.plain.links import differences
from dualpipe.schedule import UP, Task
from dualpipe.testing import record_ranks


def two_losses(rank, early: bool) -> None:
    """The last stage runs the engine once for each of two losses; ``early`` sends what the first one gives."""
    torch.manual_seed(rank)
    stage = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for _ in range(3):
        if rank == 0:
            y = stage(torch.randn(2, 4))
            dist.send(y.detach(), 1)
            gradient = torch.empty(2, 4)
            dist.recv(gradient, 1)
            y.backward(gradient)
        else:
            x = torch.empty(2, 4)
            dist.recv(x, 0)
            y = stage(x.requires_grad_()).tanh()
            first = y.square().mean()
            first.backward(retain_graph=True)
            if early:
                dist.send(x.grad, 0)
            second = y.exp().mean()
            second.backward()
            if not early:
                dist.send(x.grad, 0)
    optimizer.step()


@pytest.mark.parametrize("early", [False, True])
def test_two_losses_of_a_microbatch_are_equal_and_a_gradient_sent_between_them_is_a_caveat(early):
    recording = record_ranks(2, lambda rank: two_losses(rank, early), compare=True)
    assert recording.comparison.verdict == "equal", recording.comparison.text()
    (note,) = recording.comparison.chunks[0].notes
    assert ("3 links to neighbouring stages are not compared" in note) == early
    assert (note == "3 links agree with the neighbouring stages up to rounding") == (not early)
    assert ("3 backwards ran again after their gradients were sent" in recording.caveats) == early


def test_a_gradient_that_a_residual_passes_on_is_not_that_of_another_microbatch():
    gradient, other = torch.ones(3), torch.zeros(3)
    found = {"took": [], "gradients": [gradient], "ran": True, "input gradients": [gradient]}
    first, after = Task(UP, 0, 0), Task(UP, 1, 0)
    forwards = {first: found, after: {"input gradients": [other]}}
    assert [which for which, _ in differences(first, found, forwards, {})] == ["outside"]
    forwards[Task(UP, 1, 1)] = {"input gradients": [gradient]}
    assert [which for which, _ in differences(first, found, forwards, {})] == ["fault"]


def test_a_link_to_a_stage_that_cannot_be_run_plainly_is_not_a_difference():
    x, gradient = torch.ones(3), torch.zeros(3)
    found = {"took": [x], "gradients": [gradient], "ran": True}
    kept = {"returned": [2 * x], "plainly": [3 * x], "input gradients": [x]}
    forwards = {Task(UP, 0, 0): kept, Task(UP, 1, 0): found, Task(UP, 2, 0): {"error": "ValueError: no peer"}}
    assert [which for which, _ in differences(Task(UP, 1, 0), found, forwards, {})] == ["alone", "alone"]


def test_a_gradient_in_place_of_an_activation_is_a_difference_that_names_it():
    x, gradient = torch.ones(3), torch.full((3,), 2.0)
    before = {"returned": [x], "plainly": [x], "input gradients": []}
    found = {"took": [gradient], "gradients": [x], "ran": True, "input gradients": [x]}
    after = {"returned": [], "plainly": [], "input gradients": [gradient]}
    forwards = {Task(UP, 0, 0): before, Task(UP, 1, 0): found, Task(UP, 2, 0): after}
    assert list(differences(Task(UP, 1, 0), found, forwards, {})) == [
        (
            "fault",
            "microbatch 0 does not take what stage 0 returns for it, but the gradient of the input of stage 2 for "
            "microbatch 0",
        ),
        (
            "fault",
            "microbatch 0 does not take the gradient that stage 2 has for it, but the output of stage 0 for "
            "microbatch 0",
        ),
    ]
    after["input gradients"] = [torch.full((3,), 3.0)]
    found["took"], found["gradients"] = [torch.zeros(3)], [torch.zeros(3)]
    forwards[Task(UP, 0, 1)] = {"returned": [torch.zeros(3)]}
    assert [which for which, _ in differences(Task(UP, 1, 0), found, forwards, {})] == ["outside", "outside"]
