"""Programs that keep gradients in tensors of their own, as for float32 masters of bfloat16 weights."""

import pytest
import torch
from torch import nn

from dualpipe.testing import record_ranks
from tests.record.two_ranks import train

MICROBATCHES = 3


def added(own, gradient, mb):
    own.add_(gradient.view(-1).to(own.dtype))


def copied_at_the_end(own, gradient, mb):
    if mb == MICROBATCHES - 1:
        own.copy_(gradient.view(-1))
    return mb < MICROBATCHES - 1


def gathered(own, gradient, mb):
    own.untyped_storage()[0] = int(gradient.sum())  # by code that PyTorch's operators do not show


def forgets_the_second(own, gradient, mb):
    if mb != 1:
        own.add_(gradient.view(-1).to(own.dtype))


@pytest.mark.parametrize(
    ("collect", "dtype", "optimized", "verdict", "story"),
    [
        (added, torch.float32, True, "equal", "kept in a tensor of the program's own, which its optimizer uses"),
        (added, torch.bfloat16, True, "equal", "kept in a tensor of the program's own, which its optimizer uses"),
        (
            copied_at_the_end,
            torch.float32,
            True,
            "equal",
            "kept in a tensor of the program's own, which its optimizer uses",
        ),
        (forgets_the_second, torch.float32, True, "different", "the gradient lacks microbatch 1"),
        (
            added,
            torch.float32,
            False,
            "unknown",
            "the program has cleared the gradient after it made another tensor from it at ",
        ),
        (gathered, torch.float32, False, "unknown", "the program has cleared the gradient, and no optimizer"),
    ],
)
def test_gradients_of_masters_are_compared_if_an_optimizer_uses_them(collect, dtype, optimized, verdict, story):
    alive = []  # to the end of the process

    def body(rank):
        torch.manual_seed(rank)
        stage = nn.Linear(4, 4)
        of_stage = list(stage.parameters())
        flat = torch.zeros(20, dtype=dtype)
        alive.append(flat)
        sums = [flat[:16], flat[16:]]
        master = torch.cat([parameter.detach().reshape(-1) for parameter in of_stage])
        optimizer = torch.optim.SGD([master], lr=0.1)
        for mb in range(MICROBATCHES):
            train(rank, stage, 1)
            for own, parameter in zip(sums, of_stage, strict=True):
                if not collect(own, parameter.grad, mb):
                    parameter.grad = None
        if optimized:
            master.grad = flat.to(master.dtype)
        optimizer.step()

    comparison = record_ranks(2, body, compare=True).comparison
    assert comparison.verdict == verdict, comparison.text()
    assert story in comparison.text()
