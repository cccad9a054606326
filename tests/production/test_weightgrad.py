"""The split of a linear layer's backward: B gives the input gradient, W the weight gradient, with the stock bits.

forward      splitting(key)   y = x W^T + b     autograd sees x alone
backward (B)                  dx = dy W         the store keeps x and dy
run(key)  (W)                 dW += dy^T x      db += sum of dy
"""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dualpipe.weightgrad import WeightGradError, WeightGradStore, split_linears

SHAPE = (2, 5, 8)


def model(**options) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16, **options), nn.GELU(), nn.Linear(16, 8, **options))


def gradients(module: nn.Module) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(found, wanted) -> bool:
    pairs = list(zip(found, wanted, strict=True))
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


def both(module: nn.Module, microbatches: int = 3, dtype=torch.float32, needs_input=True):
    """Run stock and split backwards side by side; W after all B.  Returns (split module, x grads) of both."""
    stock, split = module.to(dtype), copy.deepcopy(module).to(dtype)
    store = WeightGradStore()
    split_linears(split, store)
    torch.manual_seed(2)
    inputs = [torch.randn(SHAPE, dtype=dtype) for _ in range(microbatches)]
    stock_x, split_x = ([x.clone().requires_grad_(needs_input) for x in inputs] for _ in range(2))
    for x in stock_x:
        stock(x).pow(2).sum().backward()
    for key, x in enumerate(split_x):
        with store.splitting(key):
            y = split(x)
        y.pow(2).sum().backward()
    before = [linear.weight.grad for linear in split if isinstance(linear, nn.Linear)]
    for key in range(microbatches):
        store.run(key)
    store.require_empty()
    assert before == [None, None]
    return stock, split, [x.grad for x in stock_x], [x.grad for x in split_x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_b_leaves_no_weight_gradient_and_w_gives_the_stock_bits(dtype, bias):
    stock, split, stock_x, split_x = both(model(bias=bias), dtype=dtype)
    assert same(gradients(split), gradients(stock))
    assert same(split_x, stock_x)


def test_a_first_layer_whose_input_needs_no_gradient_still_gets_its_own():
    torch.manual_seed(1)
    stock, split, _, found = both(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), needs_input=False)
    assert same(gradients(split), gradients(stock))
    assert found == [None, None, None]


def test_frozen_weights_stay_without_gradient():
    frozen = model()
    frozen[1].weight.requires_grad_(False)
    stock, split, *_ = both(frozen)
    assert same(gradients(split), gradients(stock))
    assert split[1].weight.grad is None
    assert split[1].bias.grad is not None


def test_a_weight_that_two_layers_share_counts_twice():
    torch.manual_seed(1)
    shared = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    shared[2].weight = shared[0].weight
    stock, split, *_ = both(shared, microbatches=1)
    assert split[0].weight is split[2].weight
    assert same(gradients(split), gradients(stock))


def test_hooks_on_a_parameter_fire_at_w_and_not_at_b():
    module, store, fired = model(), WeightGradStore(), []
    split_linears(module, store)
    module[1].weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.grad is not None))
    with store.splitting("a"):
        y = module(torch.randn(SHAPE))
    y.sum().backward()
    assert fired == []
    store.run("a")
    assert fired == [True]


def test_outside_of_splitting_the_backward_is_whole():
    module, store = model(), WeightGradStore()
    assert split_linears(module, store) == 2
    module(torch.randn(SHAPE)).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    store.require_empty()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_split_too(reentrant):
    stock, split, store = model(), model(), WeightGradStore()
    split_linears(split, store)
    torch.manual_seed(2)
    x = torch.randn(SHAPE)
    stock(x.clone().requires_grad_()).pow(2).sum().backward()
    with store.splitting("a"):
        y = checkpoint(split, x.clone().requires_grad_(), use_reentrant=reentrant)
    with store.splitting("a"):  # as the interpreter does for B, so that the recomputed forward sees the same
        y.pow(2).sum().backward()
    assert split[1].weight.grad is None
    store.run("a")
    assert same(gradients(split), gradients(stock))


def test_a_subclass_with_a_forward_of_its_own_is_left_whole():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    assert split_linears(nn.Sequential(Own(8, 8), nn.Linear(8, 8)), WeightGradStore()) == 1


def test_after_b_only_the_inputs_and_output_gradients_of_linear_layers_stay():
    module, store, kept = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), WeightGradStore(), []
    split_linears(module, store)
    module[1].register_forward_hook(lambda layer, args, out: kept.append((weakref.ref(args[0]), weakref.ref(out))))
    with store.splitting("a"):
        y = module(torch.randn(SHAPE))
    y.sum().backward()
    del y
    gc.collect()
    [(gelu_input, gelu_output)] = kept
    assert gelu_input() is None
    store.run("a")
    gc.collect()
    assert gelu_output() is None


def test_w_without_b_and_w_twice_are_told():
    store = WeightGradStore()
    with pytest.raises(WeightGradError, match="its B has not run"):
        store.run("3W0<")
    store.open("3W0<")
    store.run("3W0<")
    with pytest.raises(WeightGradError, match="its W already has"):
        store.run("3W0<")


def test_a_forgotten_w_is_told_at_the_end():
    store = WeightGradStore()
    store.open("3W0<")
    with pytest.raises(WeightGradError, match="never computed: 3W0<"):
        store.require_empty()


def test_autocast_is_refused():
    module, store = model(), WeightGradStore()
    split_linears(module, store)
    with (
        torch.autocast("cpu", torch.bfloat16),
        store.splitting("a"),
        pytest.raises(WeightGradError, match="autocast"),
    ):
        module(torch.randn(SHAPE))
