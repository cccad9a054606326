"""What the split of a backward leaves alone: layers that need the full backward, found in the first microbatch.

first F, B   the stock layer, watched: what cannot be split is named once, and runs unsplit from then on
later F, B   anything that the first one did not show is an error, before a gradient is wrong
"""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from dualpipe.runtime.split_linear import split_linears
from dualpipe.runtime.weightgrad import DeferredGradients, WeightGradError
from tests.production.test_weightgrad import SHAPE, Stage, both, linear, step


def forces(stage, x):
    energy = stage.b(torch.tanh(stage.a(x))).sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    return force + stage.a(x)


def looked_at(stage, x):
    y = stage.b(stage.a(x))
    torch.autograd.grad(y.sum(), stage.a.weight, retain_graph=True, allow_unused=True)
    return y


def standardized(stage, x):
    weight = stage.a.weight - stage.a.weight.mean()
    return torch.func.functional_call(stage.a, {"weight": weight, "bias": stage.a.bias}, (x,))


def compiled(stage, x):
    return torch.compile(stage.a, backend="eager")(x)


def hooked(of_weight=False):
    """Clips gradients: in a hook of the module's backward, or of the weight."""
    stage = Stage(with_tensor_hook if of_weight else lambda s, x: s.a(x), a=linear())
    if not of_weight:
        stage.register_full_backward_hook(clip)
    return stage


def with_tensor_hook(stage, x):  # a copy of a stage has none
    if not stage.a.weight._backward_hooks:
        stage.a.weight.register_hook(clipped)
    return stage.a(x)


def clipped(gradient):
    return gradient.clamp(-0.1, 0.1)


def clip(stage, *gradients):
    for parameter in stage.parameters():
        if parameter.grad is not None:
            parameter.grad.clamp_(-0.1, 0.1)


def replaced(stage, x):
    stock = functional.linear
    functional.linear = lambda *arguments: stock(*arguments) * 3
    try:
        return stage.a(x)
    finally:
        functional.linear = stock


class Twice(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        return result * 2 if function is functional.linear else result


def watched(stage, x):
    with Twice():
        return stage.a(x)


UNSPLIT = {
    "takes a gradient through it": [
        lambda: Stage(forces, a=linear(), b=linear()),
        lambda: Stage(looked_at, a=linear(), b=linear()),
    ],
    "also used outside the layer": [
        lambda: Stage(lambda s, x: s.a(x) + s.a.weight.pow(2).sum(), a=linear()),
        lambda: Stage(lambda s, x: functional.linear(s.a(x), s.a.weight), a=linear()),
        lambda: Stage(lambda s, x: checkpoint(s.a, x, use_reentrant=True) + s.a.weight.pow(2).sum(), a=linear()),
    ],
    "not a plain parameter": [
        lambda: parametrizations.weight_norm(linear()),
        lambda: nn.utils.spectral_norm(linear()),
        lambda: Stage(standardized, a=linear()),
    ],
    "it was not called": [lambda: nn.MultiheadAttention(8, 2), lambda: Stage(compiled, a=linear())],
    "under autocast": [lambda: Stage(lambda s, x: torch.autocast("cpu", torch.bfloat16)(s.a)(x), a=linear())],
    "a transform of torch.func": [lambda: Stage(lambda s, x: torch.vmap(s.a)(x), a=linear())],
    "a backward hook of its module": [lambda: hooked()],
    "its weights have tensor hooks": [lambda: hooked(of_weight=True)],
    "torch.nn.functional.linear is replaced or intercepted": [
        lambda: Stage(replaced, a=linear()),
        lambda: Stage(watched, a=linear()),
    ],
    "not contiguous": [lambda: Stage(lambda s, x: s.a(x.transpose(0, 1)), a=linear())],
}


@pytest.mark.parametrize(("reason", "make"), [(reason, make) for reason, stages in UNSPLIT.items() for make in stages])
def test_what_cannot_be_split_runs_unsplit_and_is_named_once(reason, make, caplog):
    torch.manual_seed(1)
    stage = make()
    if isinstance(stage, nn.MultiheadAttention):
        stage = Stage(lambda s, x: s.inner(x, x, x)[0], inner=stage)
    *_, deferred = both(stage)
    assert not any(deferred)
    named = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(reason in line for line in named)
    assert len(set(named)) == len(named)


def test_an_unsplit_layer_does_not_keep_the_others_from_being_split():
    *_, deferred = both(Stage(lambda s, x: s.b(s.a(x)) + s.a.weight.sum(), a=linear(), b=linear()))
    assert deferred == [0, 1, 1, 1]


def count(stage) -> int:
    stage.calls += 1
    return stage.calls


class InsideB(torch.autograd.Function):
    """Recomputes a layer in its backward and takes the input gradient there, which F does not show."""

    @staticmethod
    def forward(ctx, x, layer, create_graph):
        ctx.layer, ctx.x, ctx.create_graph = layer, x.detach(), create_graph
        return layer(x)

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            x = ctx.x.requires_grad_()
            y = ctx.layer(x)
        if not ctx.create_graph:
            return *torch.autograd.grad(y, x, dy), None, None
        torch.autograd.backward(y, dy, create_graph=True)
        return x.grad.detach(), None, None


LATE = {
    "takes a gradient through a, which its": lambda s, x: InsideB.apply(x, s.a, False) if count(s) > 2 else s.a(x),
    "takes a gradient through a, which": lambda s, x: InsideB.apply(x, s.a, True) if count(s) > 2 else s.a(x),
    "takes a gradient through a": lambda s, x: torch.autograd.grad(s.a(x).sum(), x)[0] if count(s) > 2 else s.a(x),
    "uses outside their layer the weights of a": lambda s, x: s.a(x) + (s.a.weight.sum() if count(s) > 2 else 0),
    "takes gradients of the weights of a": lambda s, x: (
        count(s) > 2 and torch.autograd.grad(s.a(x).sum(), s.a.weight, allow_unused=True),
        s.a(x),
    )[1],
    "adds in B, outside the layer, to the gradients of a": lambda s, x: (
        functional.linear(x, s.a.weight) if count(s) == 3 else s.a(x)
    ),
    "uses outside their layer the weights of a, which": lambda s, x: s.a(
        checkpoint(functional.linear, x, s.a.weight, use_reentrant=True) if count(s) > 2 else x
    ),
    r"cannot split \(its input or weight is not contiguous": lambda s, x: s.a(
        x if count(s) != 3 else x.transpose(0, 1).contiguous().transpose(0, 1)
    ),
    "modified in place after B": lambda s, x: (s.buffer.copy_(x.detach()), s.a(s.buffer))[1] + x,
}


@pytest.mark.parametrize("complaint", LATE)
def test_what_the_first_microbatch_did_not_show_is_an_error_and_never_a_wrong_gradient(complaint):
    stage = Stage(LATE[complaint], a=linear(), calls=0, buffer=torch.zeros(SHAPE))
    xs = [torch.randn(SHAPE).requires_grad_() for _ in range(4)]
    with pytest.raises(WeightGradError, match=complaint):
        step(stage, DeferredGradients(), xs)


def test_a_gradient_that_a_function_takes_within_b_is_not_deferred():
    """A module may compute its own backward by ``torch.autograd.grad``, as reversible networks do."""

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer, *parameters):
            ctx.layer, ctx.x = layer, x.detach()
            return layer(x)

        @staticmethod
        def backward(ctx, dy):
            with torch.enable_grad():
                x = ctx.x.requires_grad_()
                y = ctx.layer(x)
            dx, *others = torch.autograd.grad(y, [x, *ctx.layer.parameters()], dy)
            return dx, None, *others

    *_, deferred = both(Stage(lambda s, x: Again.apply(x, s.a, *s.a.parameters()), a=linear()))
    assert not any(deferred)


def test_a_subclass_with_its_own_forward_is_not_split():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert len(split_linears(nn.Sequential(Own(8, 8), linear()), DeferredGradients()).layers) == 1


def test_a_compiled_layer_is_not_split_and_other_kinds_are_named(caplog):
    with caplog.at_level(logging.INFO):
        split = split_linears(
            nn.Sequential(torch.compile(linear(), backend="eager"), nn.Conv1d(1, 1, 1), linear()), DeferredGradients()
        )
    assert [layer.name for layer in split.layers] == ["2"]
    assert "Conv1d (1), OptimizedModule, compiled (1)" in caplog.text
