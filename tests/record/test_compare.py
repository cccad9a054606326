"""A recorded step is compared with a plain run of its modules: gradients, losses and their number, replicas."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.testing import record_ranks

MICROBATCHES = 3
SHAPE = (2, 4)


class Split(torch.autograd.Function):
    """A linear layer whose weight gradient goes to a store while ``STORE`` is on."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors

        def add():
            found = gradient.T @ x
            weight.grad = found if weight.grad is None else weight.grad + found

        if STORE["on"]:
            STORE["queue"].append(add)
        else:
            add()
        return gradient @ weight, None


STORE = {"on": False, "queue": []}


class Stage(nn.Module):
    """A stage with a weight gradient of its own, a dropout, and a bias."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        y = torch.tanh(Split.apply(x, self.weight) + self.bias)
        if torch.all(y == y).item() and y.mean().item() < 2:  # a module that reads its tensors reads no loss
            y = self.dropout(y)
        return y


def gpipe(faults):
    """Two ranks: all forwards, all backwards, then the deferred weight gradients and an optimizer's step."""

    def body(rank):
        torch.manual_seed(rank)
        stage, loss_of = Stage(), nn.MSELoss()
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        alive, losses = [], []
        for _ in range(MICROBATCHES):
            x = torch.randn(SHAPE)
            if rank:
                dist.recv(x, 0)
                x.requires_grad_()
            alive.append((x, stage(x)))
        for number in [1, 0, 2] if "swapped" in faults else [0, 1, 2]:
            if rank == 0:
                dist.send(alive[number][1].detach(), 1)
        for x, y in alive:
            STORE["on"] = True
            if rank:
                loss = loss_of(y, torch.ones(SHAPE)) / (1 if "averaged" in faults else MICROBATCHES)
                loss.backward()
                losses.append(loss.detach())
                dist.send(x.grad, 0)
            else:
                gradient = torch.empty(SHAPE)
                dist.recv(gradient, 1)
                y.backward(gradient)
            STORE["on"] = False
        del alive, x, y
        if rank:
            del loss
        if "never run" in faults and rank == 0:
            del STORE["queue"][1]
        if "never fed" in faults:
            STORE["queue"].clear()
        while STORE["queue"]:
            STORE["queue"].pop(0)()
        if "cleared" in faults:
            losses.clear()
        for parameter in stage.parameters():
            if "averaged" in faults:
                parameter.grad.div_(MICROBATCHES)
            if "spoiled" in faults:
                parameter.grad.add_(0.5)
        nn.utils.clip_grad_norm_(stage.parameters(), 1e-3 if "clipped apart" in faults else 1e3)
        optimizer.step()
        print(len(losses))

    return body


def compared(*faults):
    """Verdict and text of the comparison."""
    comparison = record_ranks(2, gpipe(faults), compare=True).comparison
    return comparison.verdict, comparison.text()


def test_deferred_weight_gradients_are_bitwise_those_of_a_plain_run():
    verdict, text = compared()
    assert verdict == "equal"
    assert text.splitlines() == [
        "compared with a plain run of the same modules: equal",
        "  stage 0 of lane > on rank 0: outputs and gradients equal",
        "  stage 1 of lane > on rank 1: outputs and gradients equal",
        "  losses of lane > on rank 1: 3 computed, 3 of them kept or read by the end of the step; none of them is ever "
        "read on rank 1: does the program read its losses on another rank?",
        "  each loss enters the gradient with weight 0.3333: the gradient is the mean over 3 microbatches",
    ]


CLEARED = 1 + Path(__file__).read_text().splitlines().index("            losses.clear()")
FAULTS = {
    ("never run", "cleared"): (
        "stage 0 of lane > on rank 0: weight: the gradient lacks microbatch 1: is it without",
        f", and Split.backward at {__file__}:{Split.backward.__code__.co_firstlineno}",
        "3 were computed and collected, and none is kept or read by the end of the step, one is dropped at ",
        f"test_compare.py:{CLEARED}: is their list cleared before",
    ),
    ("never fed", "swapped"): (
        "stage 0 of lane > on rank 0: microbatch 0 does not take the gradient that stage 1 has for it, but the "
        "gradient of the input of stage 1 for microbatch 1; ",
        "weight: no gradient, but the plain run has one: are weight gradients put into the store, and run from it?",
    ),
    ("clipped apart",): (
        "rank 0 clips at ",
        ", which is that of the rank's own gradients; over all stages, each parameter once, it is ",
    ),
}


@pytest.mark.parametrize("faults", FAULTS, ids=" and ".join)
def test_faults_planted_in_a_program_that_runs_through_are_found(faults):
    verdict, text = compared(*faults)
    assert verdict == "different"
    for says in FAULTS[faults]:
        assert says in text


@pytest.mark.long
def test_gradients_divided_by_the_microbatches_agree_with_a_note_and_other_changes_do_not():
    verdict, text = compared("averaged")
    assert verdict == "equal"
    assert "outputs and gradients equal; divided by 3" in text
    assert "with weight 0.3333: the gradient is the mean over 3 microbatches" in text
    verdict, text = compared("spoiled")
    assert verdict == "different"
    assert "weight, bias: the gradient differs by up to 0.5" in text


def two_lanes(summed):
    """Two stages on two ranks, a lane each way; the replicas of a stage have the same weights.

    The program calls the two layers of the first stage one by one, so their parameters have the same names.
    """

    def body(rank):
        torch.manual_seed(0)
        layers, last = [nn.Linear(4, 4), nn.Linear(4, 4)], nn.Linear(4, 4)
        parameters = [parameter for layer in (*layers, last) for parameter in layer.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)

        def exchange(tensor):
            other = torch.empty(SHAPE)
            ends = [lambda: dist.send(tensor, 1 - rank), lambda: dist.recv(other, 1 - rank)]
            for end in ends if rank == 0 else reversed(ends):
                end()
            return other

        for _ in range(2):
            y = layers[1](layers[0](torch.randn(SHAPE) + rank))
            x = exchange(y.detach()).requires_grad_()
            last(x).square().mean().backward()
            y.backward(exchange(x.grad))
        for parameter in parameters if summed else ():
            dist.all_reduce(parameter.grad)
        optimizer.step()

    return body


@pytest.mark.long
def test_replicas_that_are_summed_agree_with_the_sum_over_both_lanes():
    comparison = record_ranks(2, two_lanes(True), compare=True).comparison
    assert comparison.verdict == "equal", comparison.text()
    assert [each.summed for each in comparison.chunks] == [True] * 4
    assert "summed over both lanes" in comparison.text()
    assert "tied" not in comparison.text()


def test_replicas_that_are_never_summed_are_found_before_the_optimizers_step():
    comparison = record_ranks(2, two_lanes(False), compare=True).comparison
    assert comparison.verdict == "different"
    assert all(not each.faults for each in comparison.chunks), "each lane's own gradients are right"
    assert comparison.replicas[0].startswith("the replicas of stages 0 1 were not summed")
    assert comparison.as_json()["chunks"][0]["summed"] is False
