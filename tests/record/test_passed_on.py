"""Received tensors that a rank sends on as they are: as an output of its stage, or as data beside it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.testing import record_ranks
from proofs.prove import prove
from tests.record.logs import Rank, recorded
from tests.record.two_ranks import SHAPE, receive, text


class Residual(nn.Module):
    """Returns its first input as it is, beside a tensor that it has computed."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layer, self.rank = nn.Linear(4, 4), rank

    def forward(self, x, kept=None):
        kept = 2 * x if self.rank == 0 else kept
        return self.layer(x).tanh() + kept if self.rank == 2 else (self.layer(x).tanh(), kept)


@pytest.mark.parametrize("fault", [False, True])
def test_a_received_tensor_that_a_stage_returns_as_it_is_is_its_output(fault):
    """The gradient is passed on as it is, too.  With the fault rank 1 sends the tensor of the microbatch before."""

    def body(rank):
        stage, runs = Residual(rank), []
        for _ in range(2):
            inputs = (
                [receive(rank - 1).requires_grad_() for _ in range(2)]
                if rank
                else [torch.randn(SHAPE).requires_grad_()]
            )
            runs.append((inputs, stage(*inputs)))
            if rank < 2:
                y, kept = runs[-1][1] if rank == 0 or not fault else (runs[-1][1][0], runs[0][1][1])
                dist.send(y.detach(), rank + 1)
                dist.send(kept.detach(), rank + 1)
        for inputs, outputs in runs:
            if rank == 2:
                outputs.square().sum().backward()
            else:
                torch.autograd.backward(outputs, [receive(rank + 1) for _ in range(2)])
            for x in inputs if rank else []:
                dist.send(x.grad, rank - 1)

    recording = record_ranks(3, body, compare=not fault)
    assert prove(recording.schedule).verdict == ("refuted" if fault else "proved")
    if not fault:
        assert recording.caveats == ()
        assert "1RF0>@0 1F0> 1SF0>@2" in text(recording, 1)
        assert recording.comparison.verdict == "equal", recording.comparison.text()


def test_what_a_rank_passes_on_is_not_called_the_result_of_no_module():
    one, two, three = (Rank(number, 3) for number in range(3))
    one.send(1, "F", one.forward())
    one.send(1)
    x, mask = two.receive(0), two.receive(0)
    two.send(2, "F", two.forward(x, mask))
    two.send(2, "M", mask)
    three.forward(three.receive(1), three.receive(1))
    notes = recorded(one, two, three, end=False).notes
    assert notes[0].startswith("no module call made what rank 0 sends at rank0.py:")
    assert notes[1].startswith("rank 1 passes on to a forward of rank 2, at rank1.py:")
