"""Links between stages in a comparison: what is computed further outside of modules, several losses, scales."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record.plain.links import differences
from dualpipe.schedule import UP, Task
from dualpipe.testing import record_ranks

MICROBATCHES = 3
SHAPE = (2, 4)


def train(rank, fault="", wire=torch.float32, sent=lambda x, y: x.grad) -> None:
    """Two ranks, microbatch by microbatch; the first one applies an activation outside of its module.

    ``wire`` is the type of the messages, ``sent`` the gradient that rank 1 sends for its input and output.
    """
    torch.manual_seed(rank)
    stage = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for _ in range(MICROBATCHES):
        if rank == 0:
            y = stage(torch.randn(SHAPE)).tanh()
            dist.send((y.detach() * 2 if fault == "computed apart" else y.detach()).to(wire), 1)
            gradient = torch.empty(SHAPE, dtype=wire)
            dist.recv(gradient, 1)
            y.backward(gradient.float())
        else:
            received = torch.empty(SHAPE, dtype=wire)
            dist.recv(received, 0)
            x = received.float().requires_grad_()
            y = stage(x)
            y.retain_grad()
            first, second = y.square().mean(), y.exp().mean()
            first.backward(retain_graph=True)
            early = x.grad.clone()
            second.backward()
            dist.send((early if fault == "early" else sent(x, y)).to(wire), 0)
    if fault == "averaged on one rank" and rank == 0:
        for parameter in stage.parameters():
            parameter.grad /= MICROBATCHES
    optimizer.step()


def compared(*arguments, **options):
    return record_ranks(2, lambda rank: train(rank, *arguments, **options), compare=True).comparison


def test_what_is_computed_and_cast_outside_of_modules_is_compared_at_the_ends_of_the_graph():
    comparison = compared(wire=torch.bfloat16)
    assert comparison.verdict == "equal", comparison.text()
    first, last = comparison.chunks
    assert first.notes == ("3 links agree with the neighbouring stages after a cast to a narrower type",)
    assert "3 links agree with the neighbouring stages after a cast to a narrower type" in last.notes


FAULTS = {
    "early": ("microbatch 0 takes only a part of the gradient that stage 1 has for it, 1SB0> at ", "send it after the"),
    "averaged on one rank": ("the gradients are scaled differently: by 0.3333 at stage 0 and by 1 at stage 1", ""),
    "half": ("scaled differently: by 0.5 at stage 0 and by 1 at stage 1", "it takes 0.5 times the gradients that the"),
    "of the output": ("microbatch 0 does not take the gradient that stage 1 has for it", ""),
}
SENT = {"half": lambda x, y: x.grad / 2, "of the output": lambda x, y: y.grad}


LONG = ("half", "of the output")


@pytest.mark.parametrize("fault", [pytest.param(each, marks=[pytest.mark.long] * (each in LONG)) for each in FAULTS])
def test_a_wrong_gradient_that_is_sent_or_kept_is_different(fault):
    comparison = compared(fault, **({"sent": SENT[fault]} if fault in SENT else {}))
    assert comparison.verdict == "different", comparison.text()
    for says in FAULTS[fault]:
        assert says in comparison.text()


def test_a_link_that_cannot_be_related_to_its_stages_is_unknown_and_never_equal():
    comparison = compared("computed apart")
    assert comparison.verdict == "unknown", comparison.text()
    assert "microbatch 0 does not take what stage 0 returns for it: is it computed further without autograd?" in (
        comparison.text()
    )


def test_a_gradient_that_a_residual_passes_on_is_not_that_of_another_microbatch():
    gradient, other = torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3)
    found = {"took": [], "gradients": [gradient], "ran": True, "input gradients": [gradient]}
    first, after = Task(UP, 0, 0), Task(UP, 1, 0)
    forwards = {first: found, after: {"input gradients": [other]}}
    assert [each.which for each in differences(first, found, forwards, {})] == ["unknown"]
    forwards[Task(UP, 1, 1)] = {"input gradients": [gradient]}
    assert [each.which for each in differences(first, found, forwards, {})] == ["fault"]


def test_a_link_to_a_stage_that_cannot_be_run_plainly_is_not_a_difference():
    x, gradient = torch.ones(3), torch.zeros(3)
    found = {"took": [x], "gradients": [gradient], "ran": True}
    kept = {"returned": [2 * x], "plainly": [3 * x], "input gradients": [x]}
    forwards = {Task(UP, 0, 0): kept, Task(UP, 1, 0): found, Task(UP, 2, 0): {"error": "ValueError: no peer"}}
    assert [each.which for each in differences(Task(UP, 1, 0), found, forwards, {})] == ["alone", "alone"]


def test_a_gradient_in_place_of_an_activation_is_a_difference_that_names_it():
    x, gradient = torch.ones(3), torch.full((3,), 2.0)
    before = {"returned": [x], "plainly": [x], "input gradients": []}
    found = {"took": [gradient], "gradients": [x], "ran": True, "input gradients": [x]}
    after = {"returned": [], "plainly": [], "input gradients": [gradient]}
    forwards = {Task(UP, 0, 0): before, Task(UP, 1, 0): found, Task(UP, 2, 0): after}
    assert [each[:2] for each in differences(Task(UP, 1, 0), found, forwards, {})] == [
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
    assert [each.which for each in differences(Task(UP, 1, 0), found, forwards, {})] == ["unknown", "unknown"]
