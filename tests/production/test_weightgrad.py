"""The split of a linear layer's backward: B gives the input gradient, W the weight gradient, with the stock bits.

first F, B   the stock layer, watched (tests/production/test_unsplit.py)
F            y = x W^T + b     autograd sees x alone
B            dx = dy W         the store keeps x and dy
W            dW += dy^T x      db += sum of dy
"""

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

from dualpipe.runtime.split_linear import split_linears
from dualpipe.runtime.weightgrad import DeferredGradients, WeightGradError

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
    """A microbatch's F and B, and ``delay`` microbatches later its W; returns how many gradients each B deferred."""
    split, deferred = split_linears(stage, store), []
    for key, x in enumerate(xs):
        with split.forward(key, split=True):
            loss = stage(x).float().pow(2).sum()
        if not split.learned:
            split.learn([get_gradient_edge(loss).node])
        with split.backward(key, split=True):
            loss.backward()
        deferred.append(store.count(key))
        if key >= delay:
            store.run(key - delay)
    for key in range(max(0, len(xs) - delay), len(xs)):
        store.run(key)
    store.require_empty()
    return deferred


def both(stage: nn.Module, microbatches: int = 4, dtype=torch.float32, needs_input=True):
    """Whole and split backwards side by side; returns both stages and how many gradients each B deferred.

    The gradients of parameters and inputs are compared.
    """
    stock, split = stage.to(dtype), copy.deepcopy(stage).to(dtype)
    torch.manual_seed(2)
    inputs = [torch.randn(SHAPE, dtype=dtype) for _ in range(microbatches)]
    stock_x, split_x = ([x.clone().requires_grad_(needs_input) for x in inputs] for _ in range(2))
    for x in stock_x:
        stock(x).float().pow(2).sum().backward()
    deferred = step(split, DeferredGradients(), split_x)
    assert same(gradients(split), gradients(stock))
    assert same([x.grad for x in split_x], [x.grad for x in stock_x])
    assert any(g is not None and g.any() for g in gradients(split))
    return stock, split, deferred


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
def test_after_the_first_microbatch_b_defers_every_linear_layer_to_w_with_the_stock_bits(
    dtype, bias, needs_input, caplog
):
    *_, deferred = both(model(bias=bias), dtype=dtype, needs_input=needs_input)
    assert deferred == [0, 2, 2, 2]
    assert caplog.records == []  # no layer is named as unsplit


def test_a_first_layer_whose_input_needs_no_gradient_still_gets_its_own():
    torch.manual_seed(1)
    *_, deferred = both(nn.Sequential(linear(), linear()), needs_input=False)
    assert deferred == [0, 2, 2, 2]


@pytest.mark.parametrize("frozen", ["1.weight", "1.bias"])
def test_a_frozen_weight_or_bias_stays_without_gradient(frozen):
    stage = model()
    stage.get_parameter(frozen).requires_grad_(False)
    _, split, deferred = both(stage)
    assert split.get_parameter(frozen).grad is None
    assert deferred == [0, 2, 2, 2]


def test_a_weight_that_two_layers_share_counts_twice():
    torch.manual_seed(1)
    shared = nn.Sequential(linear(), nn.GELU(), linear(), nn.GELU(), linear())
    shared[2].weight = shared[4].weight = shared[0].weight
    *_, deferred = both(shared)
    assert deferred == [0, 3, 3, 3]


def test_a_layer_used_three_times_is_summed_before_it_is_accumulated():
    *_, deferred = both(Stage(lambda s, x: s.a(s.a(s.a(x).tanh()).tanh()), a=linear()))
    assert deferred == [0, 3, 3, 3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_split_too(reentrant):
    stage = Stage(
        lambda s, x: s.b(checkpoint(lambda x: s.a(s.a(x)), x, use_reentrant=reentrant)), a=linear(), b=linear()
    )
    *_, deferred = both(stage)
    assert deferred == [0, 3, 3, 3]


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
def test_b_and_w_use_the_weights_and_input_of_f(function):
    *_, deferred = both(Stage(lambda s, x: function(s, s.b(x)), a=linear(), b=linear()))
    assert deferred == [0, 2, 2, 2]


def test_hooks_on_a_parameter_run_at_w_and_not_at_b():
    module, store, fired = model(), DeferredGradients(), []
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
    step(module, DeferredGradients(), [torch.randn(SHAPE) for _ in range(3)])
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
    stage, first, second = model(), DeferredGradients(), DeferredGradients()
    xs = [torch.randn(SHAPE) for _ in range(3)]
    assert [step(stage, store, xs) for store in (first, second, first)] == [[0, 2, 2]] * 3


def test_a_forward_that_the_user_set_on_a_layer_is_used():
    stage = model()
    inner = stage[1]
    inner.forward = lambda x: nn.Linear.forward(inner, x) * 2
    stock = copy.deepcopy(stage)
    stock[1].forward = lambda x: nn.Linear.forward(stock[1], x) * 2
    xs = [torch.randn(SHAPE) for _ in range(3)]
    deferred = step(stage, DeferredGradients(), xs)
    for x in xs:
        stock(x).pow(2).sum().backward()
    assert deferred == [0, 1, 1]
    assert same(gradients(stage), gradients(stock))


def test_after_b_only_the_inputs_and_output_gradients_of_linear_layers_stay():
    module, store, kept = nn.Sequential(linear(), nn.GELU(), linear()), DeferredGradients(), []
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
    store = DeferredGradients()
    with pytest.raises(WeightGradError, match="its B has not run"):
        store.run("3W0<")
    with store.deferring_to("3W0<"):
        pass
    store.run("3W0<")
    with pytest.raises(WeightGradError, match="its W already has"):
        store.run("3W0<")


def test_a_w_that_has_not_run_is_named_at_the_end():
    store = DeferredGradients()
    with store.deferring_to("3W0<"):
        pass
    with pytest.raises(WeightGradError, match="never computed: 3W0<"):
        store.require_empty()
