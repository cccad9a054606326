"""The ranges that the recorder puts into a program's torch.profiler traces, and the costs in them."""

import gzip
import json
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dualpipe.testing import record_ranks
from dualpipe.timeline.profiled_costs import read

SHAPE = (2, 4)
F, B, W = 0.002, 0.004, 0.003


class Slow(torch.autograd.Function):
    """Sleeps in its forward and in its backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(F)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(B)
        return gradient.clone()


class Stage(nn.Module):
    """A linear layer whose weight gradient may be left for later."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.linear(Slow.apply(x))


def step(rank, stage, optimizer):
    """GPipe of two microbatches; rank 1 defers its weight gradients, and computes those of 0 without the engine."""
    kept = []
    for _ in range(2):
        x = torch.randn(SHAPE)
        if rank:
            dist.recv(x, 0)
        x.requires_grad_()
        y = stage(x)
        if not rank:
            dist.send(y.detach(), 1)
        kept.append((x, y))
    for x, y in kept:
        if rank:
            loss = y.sum()
            (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
            dist.send(gradient, 0)
        else:
            gradient = torch.empty(SHAPE)
            dist.recv(gradient, 1)
            y.backward(gradient)
    for mb, (x, y) in enumerate(kept if rank else []):
        weight = stage.linear.weight
        if mb == 0:
            time.sleep(W)
            delta = torch.ones(4, 2) @ x.detach()
        else:
            (delta,) = torch.autograd.grad(y.sum(), weight)
        weight.grad = delta if weight.grad is None else weight.grad + delta
    optimizer.step()
    optimizer.zero_grad()


FIRST = """0F0>, post 0SF0>@1, wait 0SF0>@1, 0F1>, post 0SF1>@1, wait 0SF1>@1, post 0RB0>@1, wait 0RB0>@1, 0B0>+0W0>,
post 0RB1>@1, wait 0RB1>@1, 0B1>+0W1>""".replace("\n", " ").split(", ")
LAST = """post 1RF0>@0, wait 1RF0>@0, 1F0>, post 1RF1>@0, wait 1RF1>@0, 1F1>, 1B0>, post 1SB0>@0, wait 1SB0>@0, 1B1>,
post 1SB1>@0, wait 1SB1>@0, 1W0> ends, 1W1> part, 1W1> ends""".replace("\n", " ").split(", ")


def profiled(folder):
    def body(rank):
        stage = Stage()
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        step(rank, stage, optimizer)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(rank, stage, optimizer)
            step(rank, stage, optimizer)
        profiler.export_chrome_trace(str(folder / f"rank{rank}.json.gz"))

    return body


def names(path):
    """The names of the ranges of ops in a trace, in order of time."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation" and ">" in event["name"]]
    return [event["name"] for event in sorted(found, key=lambda event: event["ts"])]


def test_every_op_of_every_profiled_step_is_a_range_with_its_name(tmp_path):
    record_ranks(2, profiled(tmp_path))
    first, last = (names(tmp_path / f"rank{rank}.json.gz") for rank in (0, 1))
    assert first == 2 * FIRST
    assert last == 2 * LAST
    found = read([tmp_path])
    assert found.ranks == 2
    assert [times.F.samples for times in found.stages.values()] == [4, 4]
    at_first, at_last = found.stages.values()
    assert (at_first.B, at_first.W, at_last.BW) == (None, None, None)
    assert min(at_first.F.median, at_last.F.median) >= F
    assert min(at_first.BW.median, at_last.B.median) >= B
    assert (at_last.W.samples, at_last.W.upper >= W) == (4, True)
    assert found.latency.samples >= 2
    assert found.latency.median > 0
