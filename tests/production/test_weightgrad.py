"""The split of a linear layer's backward: B gives the input gradient, W the weight gradient, with the stock bits.

first F, B   the stock layer, watched: which of its uses can be split?
F            y = x W^T + b     autograd sees x alone
B            dx = dy W         the store keeps x and dy
W            dW += dy^T x      db += sum of dy
"""

import copy
import gc
import io
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from dualpipe.runtime.split_linear import split_linears
from dualpipe.runtime.weightgrad import WeightGradError, WeightGradStore

SHAPE = (2, 5, 8)


class Stage(nn.Module):
    """A stage whose forward is ``function(self, x)``, with these modules and values as attributes."""

    def __init__(self, function, **parts) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def linear(**options) -> nn.Linear:
    return nn.Linear(8, 8, **options)


def model(**options) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16, **options), nn.GELU(), nn.Linear(16, 8, **options))


def gradients(module: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(found, wanted) -> bool:
    pairs = list(zip(found, wanted, strict=True))
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


def step(stage, store, xs, delay=2):
    """A microbatch's F and B, and ``delay`` microbatches later its W; returns how many gradients each B left."""
    split, left = split_linears(stage, store), []
    for key, x in enumerate(xs):
        with split.forward(key, split=True):
            loss = stage(x).float().pow(2).sum()
        if not split.learned:
            split.learn([get_gradient_edge(loss).node])
        with split.backward(key, split=True):
            loss.backward()
        left.append(store.waiting(key))
        if key >= delay:
            store.run(key - delay)
    for key in range(max(0, len(xs) - delay), len(xs)):
        store.run(key)
    store.require_empty()
    return left


def both(stage: nn.Module, microbatches: int = 4, dtype=torch.float32, needs_input=True):
    """Whole and split backwards side by side; returns both stages and what each B left to W.

    The gradients of parameters and inputs are compared.
    """
    stock, split = stage.to(dtype), copy.deepcopy(stage).to(dtype)
    torch.manual_seed(2)
    inputs = [torch.randn(SHAPE, dtype=dtype) for _ in range(microbatches)]
    stock_x, split_x = ([x.clone().requires_grad_(needs_input) for x in inputs] for _ in range(2))
    for x in stock_x:
        stock(x).float().pow(2).sum().backward()
    left = step(split, WeightGradStore(), split_x)
    assert same(gradients(split), gradients(stock))
    assert same([x.grad for x in split_x], [x.grad for x in stock_x])
    assert any(g is not None and g.any() for g in gradients(split))
    return stock, split, left


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
def test_after_the_first_microbatch_b_leaves_every_linear_layer_to_w_with_the_stock_bits(
    dtype, bias, needs_input, caplog
):
    *_, left = both(model(bias=bias), dtype=dtype, needs_input=needs_input)
    assert left == [0, 2, 2, 2]
    assert caplog.records == []  # nothing is named as run whole


def test_a_first_layer_whose_input_needs_no_gradient_still_gets_its_own():
    torch.manual_seed(1)
    *_, left = both(nn.Sequential(linear(), linear()), needs_input=False)
    assert left == [0, 2, 2, 2]


@pytest.mark.parametrize("frozen", ["1.weight", "1.bias"])
def test_a_frozen_weight_or_bias_stays_without_gradient(frozen):
    stage = model()
    stage.get_parameter(frozen).requires_grad_(False)
    _, split, left = both(stage)
    assert split.get_parameter(frozen).grad is None
    assert left == [0, 2, 2, 2]


def test_a_weight_that_two_layers_share_counts_twice():
    torch.manual_seed(1)
    shared = nn.Sequential(linear(), nn.GELU(), linear(), nn.GELU(), linear())
    shared[2].weight = shared[4].weight = shared[0].weight
    *_, left = both(shared)
    assert left == [0, 3, 3, 3]


def test_a_layer_used_three_times_is_summed_before_it_is_accumulated():
    *_, left = both(Stage(lambda s, x: s.a(s.a(s.a(x).tanh()).tanh()), a=linear()))
    assert left == [0, 3, 3, 3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_split_too(reentrant):
    stage = Stage(
        lambda s, x: s.b(checkpoint(lambda x: s.a(s.a(x)), x, use_reentrant=reentrant)), a=linear(), b=linear()
    )
    *_, left = both(stage)
    assert left == [0, 3, 3, 3]


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


def frozen_while_it_runs(stage, x):
    stage.a.weight.requires_grad_(False)
    y = stage.a(x)
    stage.a.weight.requires_grad_(True)
    return y


def other_data(stage, x):
    """Computes with the signs of the weights, which keep their own data."""
    data = stage.a.weight.data
    stage.a.weight.data = data.sign()
    y = stage.a(x)
    stage.a.weight.data = data
    return y


def rounded(stage, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
        return stage.a(x)


@pytest.mark.parametrize("function", [frozen_while_it_runs, other_data, rounded])
def test_b_and_w_use_what_f_has_used(function):
    *_, left = both(Stage(lambda s, x: function(s, s.b(x)), a=linear(), b=linear()))
    assert left == [0, 2, 2, 2]


WHOLE = {
    "a gradient is taken through it": [
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
    "torch.nn.functional.linear is replaced or watched": [
        lambda: Stage(replaced, a=linear()),
        lambda: Stage(watched, a=linear()),
    ],
    "not contiguous": [lambda: Stage(lambda s, x: s.a(x.transpose(0, 1)), a=linear())],
}


@pytest.mark.parametrize(("reason", "make"), [(reason, make) for reason, stages in WHOLE.items() for make in stages])
def test_what_cannot_be_split_is_run_whole_and_named_once(reason, make, caplog):
    torch.manual_seed(1)
    stage = make()
    if isinstance(stage, nn.MultiheadAttention):
        stage = Stage(lambda s, x: s.inner(x, x, x)[0], inner=stage)
    *_, left = both(stage)
    assert not any(left)
    named = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(reason in line for line in named)
    assert len(set(named)) == len(named)


def test_a_layer_that_is_left_whole_does_not_keep_the_others_from_being_split():
    *_, left = both(Stage(lambda s, x: s.b(s.a(x)) + s.a.weight.sum(), a=linear(), b=linear()))
    assert left == [0, 1, 1, 1]


def count(stage) -> int:
    stage.calls += 1
    return stage.calls


class InsideB(torch.autograd.Function):
    """Computes a layer again in its backward, and takes the input gradient of that; nothing of it shows in F."""

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
        step(stage, WeightGradStore(), xs)


def test_a_gradient_that_a_hook_takes_within_b_is_not_left_to_w():
    """A module that computes its own backward by ``torch.autograd.grad``, as reversible networks do."""

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

    *_, left = both(Stage(lambda s, x: Again.apply(x, s.a, *s.a.parameters()), a=linear()))
    assert not any(left)


def test_hooks_on_a_parameter_run_at_w_and_not_at_b():
    module, store, fired = model(), WeightGradStore(), []
    split = split_linears(module, store)
    split.learned = True
    module[1].weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.grad is not None))
    with split.forward("a", split=True):
        y = module(torch.randn(SHAPE))
    with split.backward("a", split=True):
        y.sum().backward()
    assert fired == []
    store.run("a")
    assert fired == [True]


def test_between_steps_the_modules_are_as_they_were_built():
    module = model()
    step(module, WeightGradStore(), [torch.randn(SHAPE) for _ in range(3)])
    assert all("forward" not in vars(part) for part in module.modules())
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert same(list(again.parameters()), list(module.parameters()))
    module.zero_grad()
    module(torch.randn(SHAPE)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_the_same_modules_train_in_two_pipelines_in_turn():
    stage, first, second = model(), WeightGradStore(), WeightGradStore()
    xs = [torch.randn(SHAPE) for _ in range(3)]
    assert [step(stage, store, xs) for store in (first, second, first)] == [[0, 2, 2]] * 3


def test_a_forward_that_the_user_put_on_a_layer_is_used():
    stage = model()
    inner = stage[1]
    inner.forward = lambda x: nn.Linear.forward(inner, x) * 2
    stock = copy.deepcopy(stage)
    stock[1].forward = lambda x: nn.Linear.forward(stock[1], x) * 2
    xs = [torch.randn(SHAPE) for _ in range(3)]
    left = step(stage, WeightGradStore(), xs)
    for x in xs:
        stock(x).pow(2).sum().backward()
    assert left == [0, 1, 1]
    assert same(gradients(stage), gradients(stock))


def test_a_subclass_with_a_forward_of_its_own_is_left_whole():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert len(split_linears(nn.Sequential(Own(8, 8), linear()), WeightGradStore()).layers) == 1


def test_what_is_compiled_is_left_whole_and_other_kinds_are_named(caplog):
    with caplog.at_level(logging.INFO):
        split = split_linears(
            nn.Sequential(torch.compile(linear(), backend="eager"), nn.Conv1d(1, 1, 1), linear()), WeightGradStore()
        )
    assert [layer.name for layer in split.layers] == ["2"]
    assert "Conv1d (1), OptimizedModule, compiled (1)" in caplog.text


def test_after_b_only_the_inputs_and_output_gradients_of_linear_layers_stay():
    module, store, kept = nn.Sequential(linear(), nn.GELU(), linear()), WeightGradStore(), []
    split = split_linears(module, store)
    split.learned = True
    module[1].register_forward_hook(lambda layer, args, out: kept.append((weakref.ref(args[0]), weakref.ref(out))))
    with split.forward("a", split=True):
        y = module(torch.randn(SHAPE))
    with split.backward("a", split=True):
        y.sum().backward()
    del y
    gc.collect()
    [(gelu_input, gelu_output)] = kept
    assert gelu_input() is None
    store.run("a")
    gc.collect()
    assert gelu_output() is None


def test_w_without_b_and_w_twice_are_errors():
    store = WeightGradStore()
    with pytest.raises(WeightGradError, match="its B has not run"):
        store.run("3W0<")
    with store.collecting("3W0<"):
        pass
    store.run("3W0<")
    with pytest.raises(WeightGradError, match="its W already has"):
        store.run("3W0<")


def test_a_forgotten_w_is_named_at_the_end():
    store = WeightGradStore()
    with store.collecting("3W0<"):
        pass
    with pytest.raises(WeightGradError, match="never computed: 3W0<"):
        store.require_empty()
