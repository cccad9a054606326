"""Splits the backward of Megatron's linear layers into B and W.

``ColumnParallelLinear`` and ``RowParallelLinear`` (qkv, projections, the MLP, the output layer, the experts of a
``SequentialMLP``) compute in ``_forward_impl``, whose autograd Function computes both gradients at once.  Here
``dualpipe.runtime.split_stage`` splits it.  B computes the input gradient, with its collectives, and leaves the rest
to W::

    B    dx = dy W        then all-reduce (tensor parallel) or reduce-scatter (sequence parallel) of dx
    W    [all-gather x]   dW = dy^T x, db = sum of dy, added through autograd's own accumulation,
                          so the data-parallel wrapper's hook adds to main_grad and counts the parameter as ready

Transformer Engine's layers can delay their weight gradient and compute it in ``backward_dw`` (Megatron delays it only
with a setting that is refused here).  All other layers (norms, embeddings, routers, grouped experts) compute their
whole gradient in B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from dualpipe.runtime.split_linear import find_layers, linear_layer
from dualpipe.runtime.split_stage import Layer, SplitStage
from dualpipe.runtime.weightgrad import DeferredGradients, training

Delayed = Callable[[], None]


@dataclass(frozen=True)
class _Use:
    """One use of a layer: the products of Megatron's own Function, on the same views, so that bits agree."""

    name: str
    weight: Tensor
    bias: Tensor | None
    fused: bool
    allreduce_dgrad: bool
    sequence_parallel: bool
    group: dist.ProcessGroup | None
    trained: tuple[Tensor, ...]

    def unfit(self, x: Tensor) -> str | None:
        return None if self.trained[0] is self.weight else "its weight is frozen and its bias is not"

    def output(self, x: Tensor) -> Tensor:
        y = torch.matmul(self._whole(x), self.weight.t())
        return y if self.bias is None else y + self.bias

    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        dx = dy.matmul(weight)
        if self.allreduce_dgrad:
            dist.all_reduce(dx, group=self.group)
        if self.sequence_parallel:
            shard = torch.empty_like(x)
            megatron_layers.dist_reduce_scatter_func(shard, dx, group=self.group)
            dx = shard
        return dx

    def weight_gradients(self, x: Tensor, dy: Tensor) -> Sequence[Tensor]:
        dy, whole = dy.reshape(-1, dy.shape[-1]), self._whole(x).reshape(-1, self.weight.shape[1])
        gradients = [_fused(whole, dy, self.weight) if self.fused else dy.t().matmul(whole)]
        return gradients if len(self.trained) == 1 else [*gradients, dy.sum(dim=0)]

    def _whole(self, x: Tensor) -> Tensor:
        """The whole sequence from its shards: [tokens / tp, batch, in] to [tokens, batch, in]."""
        if not self.sequence_parallel:
            return x
        assert self.group is not None
        whole = x.new_empty((x.shape[0] * self.group.size(), *x.shape[1:]))
        megatron_layers.dist_all_gather_func(whole, x.contiguous(), group=self.group)
        return whole


def _fused(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
    """Add to ``main_grad`` in the kernel of Megatron's gradient accumulation fusion.

    Returns a gradient for autograd to accumulate, which the data-parallel hook does not add again.
    """
    parameter: Any = weight  # Megatron's wrapper adds attributes
    main_grad: Tensor = parameter.main_grad
    kernels = megatron_layers.fused_weight_gradient_mlp_cuda
    single = main_grad.dtype == torch.float32
    kernel = kernels.wgrad_gemm_accum_fp32 if single else kernels.wgrad_gemm_accum_fp16
    kernel(x, dy, main_grad)
    parameter.grad_added_to_main_grad = True  # the wrapper's hook then ignores what autograd accumulates
    zero = getattr(parameter, "zero_out_wgrad", False)
    return (torch.zeros_like if zero else torch.empty_like)(weight)


def _forward_impl(layer: Layer, stage: SplitStage, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:
    """Run a layer of a stage, in place of the class's own ``_forward_impl``."""
    method: Callable[..., Tensor] = type(layer.module)._forward_impl  # type: ignore[attr-defined] # of both kinds
    stock = partial(method, layer.module, input, weight, *args, **options)
    if args or torch.compiler.is_compiling():
        return stock()
    use = _Use(
        layer.name,
        weight,
        options["bias"],
        options["gradient_accumulation_fusion"],
        options["allreduce_dgrad"],
        options["sequence_parallel"],
        options["tp_group"],
        training(weight, options["bias"]),
    )
    return stage.apply(use, input, stock, layer.within)


@dataclass(frozen=True)
class Split:
    """How the backward of a chunk is split: the layers that leave their weight gradient to the store, and the
    ``backward_dw`` of those that delay it themselves, to be called in W."""

    stage: SplitStage
    delayed: tuple[Delayed, ...]


def split_layers(module: nn.Module, store: DeferredGradients, name: str = "the chunk") -> Split:
    """Find the layers of ``module`` that can leave their weight gradient to ``store``, or delay it themselves.

    Layers with a weight matrix that cannot be split are named in the log, once for each kind.
    """
    delayed = tuple(layer.backward_dw for layer in module.modules() if _delays(layer))
    return Split(find_layers(module, store, name, _layer), delayed)  # type: ignore[arg-type] # unknown to torch's types


def _layer(name: str, module: nn.Module) -> Layer | None:
    if _delays(module):
        return None
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
        return Layer(name, module, "_forward_impl", _forward_impl) if type(module)._forward_impl in _STOCK else None
    return linear_layer(name, module)


_STOCK = (ColumnParallelLinear._forward_impl, RowParallelLinear._forward_impl)


def _delays(layer: nn.Module) -> bool:
    """Whether the layer delays its weight gradient until ``backward_dw``, as Transformer Engine's layers can."""
    store = getattr(layer, "wgrad_store", None)
    return callable(getattr(layer, "backward_dw", None)) and store is not None and store.delay_wgrad_compute()
