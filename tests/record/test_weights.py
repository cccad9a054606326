"""A W is in the file only if the gradients of the stage's parameters were really computed."""

from collections import deque
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record.child import compute
from dualpipe.record.child.flow import Flow
from dualpipe.record.child.patches import Patches
from dualpipe.testing import record_ranks
from proofs.prove import prove
from tests.record.two_ranks import SHAPE, receive

MICROBATCHES = 3
STORE = deque()


class Deferred(torch.autograd.Function):
    """A linear layer that puts its weight gradient into ``STORE``, and gives autograd what ``Layer.dummy`` says."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.weight.T

    @staticmethod
    def backward(ctx, gradient):
        (x,), layer = ctx.saved_tensors, ctx.layer

        def add():
            with torch.no_grad():
                layer.keep(layer.weight, gradient.T @ x)

        if layer.at_once:
            layer.at_once -= 1
            add()
        else:
            STORE.append(add)
        return gradient @ layer.weight, torch.zeros_like(layer.weight) if layer.dummy == "zeros" else None, None


def assign(weight, found):
    weight.grad = found if weight.grad is None else weight.grad + found


def add_list(weight, found):
    torch._foreach_add_([weight.grad], [found])


def copy_list(weight, found):
    torch._foreach_copy_([weight.grad], torch._foreach_add([found], [weight.grad]))


def add_out(weight, found):
    torch.add(weight.grad, found, out=weight.grad)


def add_to_flat(weight, found):
    weight.flat.add_(torch.cat([torch.zeros(4), found.reshape(-1)]))  # a buffer that begins before the gradient


class Layer(nn.Module):
    """``dummy`` is what the backward gives autograd for the weight: ``none``, ``zeros``, or it hides the weight.

    ``keep`` adds a weight gradient to ``.grad``, which is in a flat buffer if it is not ``assign``.  The first
    ``at_once`` weight gradients are not deferred.
    """

    def __init__(self, dummy, bias=True, keep=assign, at_once=0):
        super().__init__()
        self.dummy, self.keep, self.at_once = dummy, keep, at_once
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.zeros(4)) if bias else None
        if keep is not assign:
            self.weight.flat = torch.zeros(20)
            self.weight.grad = self.weight.flat[4:].view(4, 4)

    def forward(self, x):
        y = Deferred.apply(x.requires_grad_(), None if self.dummy == "hidden" else self.weight, self)
        return y if self.bias is None else y + self.bias


class Experts(nn.Module):
    """Each microbatch uses one of two experts; a third parameter is frozen and another has a gradient of zero."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.down, self.up = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.zeros(2, 4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.experts[self.calls % 2](x) * self.frozen + x @ self.down @ self.up


def gpipe(stages, run=MICROBATCHES):
    """Two ranks: all forwards, all backwards, and then ``run`` of the weight gradients in the store."""

    def body(rank):
        stage = stages[rank]()
        alive = []
        for _ in range(MICROBATCHES):
            x = receive(0).requires_grad_() if rank else torch.randn(SHAPE)
            y = stage(x)
            if rank == 0:
                dist.send(y.detach(), 1)
            alive.append((x, y))
        for x, y in alive:
            if rank:
                y.square().sum().backward()
                dist.send(x.grad, 0)
            else:
                y.backward(receive(1))
        for _ in range(min(run, len(STORE))):
            STORE.popleft()()

    return body


def weights(recording, rank):
    """The microbatches whose W a rank has."""
    return [placed.op.mb for placed in recording.schedule if placed.rank == rank and str(placed.op)[1] == "W"]


@pytest.mark.parametrize("dummies", [("none", "zeros"), ("hidden", "none")])
def test_a_weight_gradient_that_is_stored_and_never_run_is_no_w(dummies):
    recording = record_ranks(2, gpipe([lambda d=d: Layer(d) for d in dummies], run=MICROBATCHES - 1))
    assert [weights(recording, rank) for rank in (0, 1)] == [[0, 1], [0, 1]]
    story = prove(recording.schedule).as_json()["checks"]["complete"]["story"]
    assert "rank 0 never computes the weight gradient of microbatch 2" in story, story
    lost = "gives weight of stage 0 no gradient, and nothing adds one later in the step: it has no W (1 times)"
    assert lost in recording.notes[0]


@pytest.mark.parametrize("ways", [(add_list, copy_list), (add_out, add_to_flat)])
def test_a_weight_gradient_is_a_w_whichever_operator_adds_it(ways):
    recording = record_ranks(2, gpipe([lambda keep=keep: Layer("none", False, keep) for keep in ways]), compare=True)
    assert [weights(recording, rank) for rank in (0, 1)] == [[0, 1, 2], [0, 1, 2]], recording.text()
    assert (recording.caveats, recording.notes) == ((), ())
    assert recording.comparison.verdict == "equal", recording.comparison.text()


def test_a_store_that_is_never_run_leaves_no_w():
    recording = record_ranks(2, gpipe([lambda: Layer("none"), lambda: Layer("none", bias=False)], run=0))
    assert [weights(recording, rank) for rank in (0, 1)] == [[], []]


def test_only_the_last_weight_gradient_is_stored_and_never_run():
    stages = [lambda: Layer("hidden", at_once=MICROBATCHES - 1)] * 2
    recording = record_ranks(2, gpipe(stages, run=0))
    assert [weights(recording, rank) for rank in (0, 1)] == [[0, 1], [0, 1]]
    assert recording.caveats == ()
    assert "nothing adds one later in the step: it has no W (1 times)" in recording.notes[0]


def test_a_weight_that_never_gets_a_gradient_and_that_autograd_does_not_see_is_a_caveat():
    recording = record_ranks(2, gpipe([lambda: Layer("hidden"), lambda: Layer("zeros", bias=False)], run=0))
    assert recording.caveats == ("whether 6 backwards get all their weight gradients could not be determined",)
    assert ["weight of stage 0 no gradient, though the forward reads it" in recording.notes[0]] == [True]
    assert ["weight of stage 1 nothing but zeros" in recording.notes[1]] == [True]


def test_deferred_weight_gradients_and_parameters_without_one_are_no_caveat():
    recording = record_ranks(2, gpipe([lambda: Layer("zeros"), Experts]))
    assert [weights(recording, rank) for rank in (0, 1)] == [[0, 1, 2], [0, 1, 2]]
    assert (recording.caveats, recording.notes) == ((), ())
    assert prove(recording.schedule).exit_code == 0


@pytest.mark.parametrize("by_setter", [True, False])
def test_a_main_grad_that_is_replaced_is_noted_where_it_is_set(by_setter):
    events, patches, layer = [], Patches(), nn.Linear(4, 4)
    flow = Flow(events.append)
    with compute.watch(flow, patches, (), ()):
        try:
            layer.weight.main_grad = torch.zeros(4, 4)  # the first one replaces nothing
            layer(torch.randn(SHAPE)).sum().backward()
            new = torch.zeros(4, 4)
            if by_setter:
                layer.weight.main_grad = new
            else:
                layer.weight.__dict__["main_grad"] = new
            layer(torch.randn(SHAPE)).sum().backward()
        finally:
            patches.undo()
    (changed,) = [event for event in events if event["event"] == "changed"]
    assert changed["name"] == ("replaced" if by_setter else "found replaced")
    source = Path(__file__).read_text().splitlines()
    set_at = next(n for n, line in enumerate(source, 1) if line.strip() == "layer.weight.main_grad = new")
    assert changed["at"].startswith(f"{__file__}:{set_at}") == by_setter
    assert "__setattr__" not in vars(nn.Parameter)


def test_a_main_grad_that_has_a_weight_gradient_already_is_a_w():
    """As if a program keeps late weight gradients in a tensor of its own, which becomes ``main_grad`` in the end."""
    events, patches, layer = [], Patches(), nn.Linear(4, 4, bias=False)
    with compute.watch(Flow(events.append), patches, (), ()):
        try:
            x = torch.randn(SHAPE)
            layer.weight.main_grad = layer(x).detach().t() @ x
            layer.weight.grad = layer.weight.main_grad
        finally:
            patches.undo()
    assert [event["forwards"] for event in events if event["event"] == "weights"] == [[0]]
