"""The split of Megatron's linear layers: B gives the input gradient, W the weight gradient, with Megatron's own bits.

first F, B   Megatron's own layer, observed
F            y = x W^T + b     autograd sees x alone
B            dx = dy W         all-reduced or scattered over tensor-parallel ranks
W            dW = dy^T x       into main_grad, by the hook of the data-parallel wrapper
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import reference.megatron  # noqa: F401 # imports megatron-core, quietly
from dualpipe.megatron.on_cpu import install_cpu_standins
from dualpipe.runtime.weightgrad import DeferredGradients
from dualpipe.testing.launch import launch
from reference.megatron.importing import expected_warnings

TOKENS, BATCH, WIDTH = 4, 2, 8
MICROBATCHES = 3


def in_ranks(ranks, body):
    """Run ``body`` in that many tensor-parallel ranks and return what each returned."""

    @expected_warnings()
    def run(context):
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        install_cpu_standins()
        parallel_state.initialize_model_parallel(ranks, create_gloo_process_groups=False)
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        return body(context)

    return launch(ranks, run, timeout=60).values()


def settings(**options):
    from megatron.core.transformer import TransformerConfig

    plain = {
        "num_layers": 1,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "cuda_graph_scope": [],
    }
    return TransformerConfig(**{**plain, **options})


class Block(nn.Module):
    """A column-parallel and a row-parallel layer with a norm before and GELU between, as in a transformer's MLP."""

    def __init__(self, config, skip_bias_add):
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

        super().__init__()
        options = {"config": config, "init_method": config.init_method, "skip_bias_add": skip_bias_add, "bias": True}
        self.norm = nn.LayerNorm(WIDTH)
        self.up = ColumnParallelLinear(WIDTH, 2 * WIDTH, gather_output=False, **options)
        self.down = RowParallelLinear(2 * WIDTH, WIDTH, input_is_parallel=True, **options)

    def forward(self, x):
        x, bias = self.up(self.norm(x))
        x, other = self.down(torch.nn.functional.gelu(x if bias is None else x + bias))
        return x if other is None else x + other


def build(config, skip_bias_add=False):
    """Build a block, with the same weights at every call."""
    torch.manual_seed(2)
    return Block(config, skip_bias_add)


def wrapped(block, config, **options):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(config, DistributedDataParallelConfig(**options), block)


def main_gradients(model):
    return {name: p.main_grad.clone() for name, p in model.module.named_parameters() if p.requires_grad}


def train(model, store=None, microbatches=MICROBATCHES, tokens=TOKENS, needs_input=True):
    """Forward and backward of all microbatches, each W after all B; returns input gradients and main gradients."""
    from dualpipe.megatron.layers import split_layers

    split = split_layers(model, store or DeferredGradients()).stage
    split.learned = True  # without a store, no backward is split anyway
    generator = torch.Generator().manual_seed(3)
    dtype = next(model.parameters()).dtype
    inputs = [torch.randn(tokens, BATCH, WIDTH, generator=generator).to(dtype) for _ in range(microbatches)]
    for key, x in enumerate(inputs):
        x.requires_grad_(needs_input)
        last = key == microbatches - 1
        with nullcontext() if last else model.no_sync():
            with split.forward(key, store is not None):
                y = model(x)
            with split.backward(key, store is not None):
                y.pow(2).sum().backward()
    after_b = main_gradients(model)
    for key in range(microbatches if store is not None else 0):
        with nullcontext() if key == microbatches - 1 else model.no_sync():
            store.run(key)
    model.finish_grad_sync()
    return [x.grad for x in inputs], main_gradients(model), after_b


def stock_and_split(config, skip_bias_add=False, dtype=torch.float32, freeze=(), ddp=None, **options):
    found = []
    for store in (None, DeferredGradients()):
        block = build(config, skip_bias_add).to(dtype)
        for name in freeze:
            block.get_parameter(name).requires_grad_(False)
        found.append(train(wrapped(block, config, **(ddp or {})), store, **options))
    return found


def same(a, b):
    return all(torch.equal(x, y) if x is not None else y is None for x, y in zip(a, b, strict=True))


def assert_equal(stock, split):
    assert same(stock[0], split[0])
    assert stock[1].keys() == split[1].keys()
    assert same(stock[1].values(), split[1].values())
    assert any(gradient.any() for gradient in split[1].values())


@pytest.mark.parametrize("skip_bias_add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_b_leaves_no_weight_gradient_and_w_gives_megatrons_bits(skip_bias_add, dtype):
    def body(context):
        ddp = {"grad_reduce_in_fp32": True}
        return stock_and_split(settings(params_dtype=dtype), skip_bias_add, dtype, ddp=ddp)

    [(stock, split)] = in_ranks(1, body)
    assert_equal(stock, split)
    after_b = split[2]
    assert not after_b["up.weight"].any()
    assert not after_b["down.weight"].any()
    assert after_b["norm.weight"].any()
    assert after_b["up.bias"].any() == skip_bias_add  # autograd computes the gradient of a bias that the caller adds


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_under_tensor_parallelism_b_reduces_the_input_gradient(sequence_parallel):
    def body(context):
        config = settings(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
        return stock_and_split(config, tokens=TOKENS // 2 if sequence_parallel else TOKENS)

    for stock, split in in_ranks(2, body):
        assert_equal(stock, split)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_data_parallel_hook_fires_once_for_each_weight_at_the_last_w(overlap):
    def body(context):
        return stock_and_split(settings(), ddp={"overlap_grad_reduce": overlap})

    [(stock, split)] = in_ranks(1, body)
    assert_equal(stock, split)


def test_a_frozen_weight_and_an_input_without_gradient_are_left_as_megatron_leaves_them():
    def body(context):
        frozen = stock_and_split(settings(), freeze=["up.weight", "up.bias"])
        return frozen, stock_and_split(settings(), needs_input=False)

    [pairs] = in_ranks(1, body)
    for stock, split in pairs:
        assert_equal(stock, split)


class _Kernels:
    """Stands in for Megatron's fused kernels: adds to ``main_grad`` in place."""

    def __init__(self):
        self.calls = 0

    def wgrad_gemm_accum_fp32(self, x, dy, main_grad):
        self.calls += 1
        main_grad.add_(dy.reshape(-1, dy.shape[-1]).t().matmul(x.reshape(-1, x.shape[-1])))


def test_with_gradient_accumulation_fusion_w_calls_the_fused_kernel_once_for_each_weight_and_microbatch():
    def body(context):
        from megatron.core.tensor_parallel import layers

        layers.fused_weight_gradient_mlp_cuda = kernels = _Kernels()
        config = settings()
        plain = train(wrapped(build(config), config))
        assert kernels.calls == 0
        other = build(config)
        for layer in (other.up, other.down):
            layer.gradient_accumulation_fusion = True
        return plain, train(wrapped(other, config), DeferredGradients()), kernels.calls

    [(plain, fused, calls)] = in_ranks(1, body)
    assert_equal(plain, fused)
    assert calls == 2 * MICROBATCHES
    assert not fused[2]["up.weight"].any()


class _Delaying(nn.Linear):
    """A layer that delays its weight gradient itself, as Transformer Engine's layers can."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.wgrad_store = SimpleNamespace(delay_wgrad_compute=lambda: True)
        self.calls = 0

    def backward_dw(self):
        self.calls += 1


def test_a_layer_that_delays_its_weight_gradient_runs_it_in_w_and_is_not_split_again():
    from dualpipe.megatron.layers import split_layers

    layer = _Delaying()
    split = split_layers(nn.Sequential(layer), DeferredGradients())
    (backward_dw,) = split.delayed
    backward_dw()
    assert layer.calls == 1
    assert split.stage.layers == []


def test_layers_that_cannot_be_split_are_logged_once_for_each_kind(caplog):
    from dualpipe.megatron.layers import split_layers

    with caplog.at_level(logging.INFO, "dualpipe.runtime.split_linear"):
        split_layers(nn.Sequential(nn.Embedding(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4)), DeferredGradients())
    [record] = caplog.records
    assert "Embedding (2)" in record.getMessage()
    assert "Linear" not in record.getMessage()


def test_layers_are_split_except_where_they_must_run_whole():
    """They run whole in the first F and B, and if weights are used outside the layer, like a tied embedding's."""

    def body(context):
        from dualpipe.megatron.layers import split_layers

        config = settings()

        def left(forward):
            block, store = build(config), DeferredGradients()
            stage, counts = split_layers(block, store).stage, []
            for key in range(3):
                with stage.forward(key, split=True):
                    loss = forward(block, torch.randn(TOKENS, BATCH, WIDTH)).sum()
                if not stage.learned:
                    stage.learn([torch.autograd.graph.get_gradient_edge(loss).node])
                with stage.backward(key, split=True):
                    loss.backward()
                counts.append(store.count(key))
                store.run(key)
            return counts

        def tied(block, x):
            return block(x) + torch.nn.functional.embedding(torch.tensor(3), block.up.weight)

        return left(lambda block, x: block(x)), left(tied)

    assert in_ranks(1, body) == [([0, 2, 2], [0, 1, 1])]


def test_under_autocast_megatrons_own_layer_runs():
    def body(context):
        from dualpipe.megatron.layers import split_layers

        layer = build(settings()).up
        stage, names = split_layers(layer, DeferredGradients()).stage, []
        stage.learned = True
        for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
            with stage.forward(0, split=True), context:
                y, _ = layer(torch.randn(TOKENS, BATCH, WIDTH))
            names.append(type(y.grad_fn).__name__)
        return names

    [(plain, autocast)] = in_ranks(1, body)
    assert plain.startswith("_SplitLinear")
    assert autocast.startswith("LinearWithGradAccumulation")


def test_a_layer_used_twice_is_summed_before_it_is_added_to_main_grad():
    """Multi-token prediction uses Megatron's output layer so; in bf16 the order of the sum matters."""

    def body(context):
        config = settings(params_dtype=torch.bfloat16)
        found = []
        for store in (None, DeferredGradients()):
            block = build(config).to(torch.bfloat16)
            once = block.forward
            block.forward = lambda x, once=once: once(once(once(x)))
            found.append(train(wrapped(block, config, grad_reduce_in_fp32=True), store))
        return found

    [(stock, split)] = in_ranks(1, body)
    assert_equal(stock, split)
