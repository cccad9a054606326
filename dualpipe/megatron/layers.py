"""Splits the backward of Megatron's linear layers into B and W.

``ColumnParallelLinear`` and ``RowParallelLinear`` (qkv, projections, the MLP, the output layer, the experts of a
``SequentialMLP``) compute through ``_forward_impl``, whose autograd Function gives both gradients at once.  A
prepared layer uses a Function that hides weight and bias from autograd; its backward gives the input gradient, with
the collectives that belong to it, and leaves the rest to W::

    B    dx = dy W        then all-reduce (tensor parallel) or reduce-scatter (sequence parallel) of dx
    W    [all-gather x]   dW = dy^T x, db = sum of dy, added through autograd's own accumulation,
                          so the data-parallel wrapper's hook adds to main_grad and counts the parameter as ready

Transformer Engine's layers split themselves when their weight gradient is delayed, and compute it in
``backward_dw`` (Megatron delays it only with a setting that is refused here).  Everything else (norms, embeddings,
routers, grouped experts) has its whole gradient in B.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from dualpipe.weightgrad import WeightGradStore, split_linears

logger = logging.getLogger(__name__)

Delayed = Callable[[], None]


@dataclass
class _Call:
    """What one forward of a layer computes with, kept from autograd's sight."""

    weight: nn.Parameter
    bias: Tensor | None
    fused: bool
    allreduce_dgrad: bool
    sequence_parallel: bool
    group: dist.ProcessGroup | None
    store: WeightGradStore
    key: Hashable


class _SplitLinear(torch.autograd.Function):
    """``y = x W^T + b``: the products of Megatron's own Function, on the same views, so the bits agree.

    ``anchor`` is an empty tensor that requires grad: without it autograd would skip a layer whose input needs none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call = call
        whole = _gather(x, call) if call.sequence_parallel else x
        y = torch.matmul(whole, call.weight.t())
        return y if call.bias is None else y + call.bias

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (x,), (dy,), call = ctx.saved_tensors, gradients, ctx.call
        x = x.detach()
        call.store.put(call.key, lambda: _accumulate(x, dy, call))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        dx = dy.matmul(call.weight)
        if call.allreduce_dgrad:
            dist.all_reduce(dx, group=call.group)
        if call.sequence_parallel:
            shard = torch.empty_like(x)
            megatron_layers.dist_reduce_scatter_func(shard, dx, group=call.group)
            dx = shard
        return dx, None, None


def _gather(x: Tensor, call: _Call) -> Tensor:
    """The whole sequence from its shards; [tokens / tp, batch, in] to [tokens, batch, in]."""
    assert call.group is not None
    whole = x.new_empty((x.shape[0] * call.group.size(), *x.shape[1:]))
    megatron_layers.dist_all_gather_func(whole, x.contiguous(), group=call.group)
    return whole


def _accumulate(x: Tensor, dy: Tensor, call: _Call) -> None:
    """W: add the weight's and the bias's gradient through autograd, so that hooks on the parameters fire."""
    whole = _gather(x, call) if call.sequence_parallel else x
    dy, whole = dy.reshape(-1, dy.shape[-1]), whole.reshape(-1, whole.shape[-1])
    leaves: list[Tensor] = [call.weight]
    gradients: list[Tensor] = [_fused(whole, dy, call.weight) if call.fused else dy.t().matmul(whole)]
    if call.bias is not None and call.bias.requires_grad:
        leaves.append(call.bias)
        gradients.append(dy.sum(dim=0))
    torch.autograd.backward(leaves, gradients)


def _fused(x: Tensor, dy: Tensor, weight: nn.Parameter) -> Tensor:
    """Add to ``main_grad`` in the kernel of Megatron's gradient accumulation fusion.

    Returns a gradient that the data-parallel hook does not add again, for autograd to accumulate.
    """
    parameter: Any = weight  # Megatron's wrapper has set attributes that torch's types do not know
    main_grad: Tensor = parameter.main_grad
    kernels = megatron_layers.fused_weight_gradient_mlp_cuda
    single = main_grad.dtype == torch.float32
    kernel = kernels.wgrad_gemm_accum_fp32 if single else kernels.wgrad_gemm_accum_fp16
    kernel(x, dy, main_grad)
    parameter.grad_added_to_main_grad = True  # the wrapper's hook then leaves what autograd accumulates
    zero = getattr(parameter, "zero_out_wgrad", False)
    return (torch.zeros_like if zero else torch.empty_like)(weight)


def _forward_impl(self: nn.Module, input: Tensor, weight: nn.Parameter, *args: Any, **options: Any) -> Tensor:
    """What a prepared layer runs in place of its class's ``_forward_impl``."""
    store: WeightGradStore = self.weight_grad_store  # type: ignore[assignment] # set by split_layers
    split = store.key is not None and weight.requires_grad and torch.is_grad_enabled()
    if not split or args or torch.is_autocast_enabled(input.device.type):
        stock: Callable[..., Tensor] = vars(type(self))["_forward_impl"]
        return stock(self, input, weight, *args, **options)
    call = _Call(
        weight,
        options["bias"],
        options["gradient_accumulation_fusion"],
        options["allreduce_dgrad"],
        options["sequence_parallel"],
        options["tp_group"],
        store,
        store.key,
    )
    anchor = input.new_empty(0, requires_grad=True)
    y: Tensor = _SplitLinear.apply(input, anchor, call)  # type: ignore[no-untyped-call]
    return y


class Split(NamedTuple):
    """What was prepared: how many layers leave their weight gradient to the store, and the ``backward_dw`` of those
    that delay it themselves, which whoever runs W calls."""

    prepared: int
    delayed: tuple[Delayed, ...]


def split_layers(module: nn.Module, store: WeightGradStore) -> Split:
    """Prepare every layer of ``module`` that can leave its weight gradient to ``store``.

    What has a matrix of weights and cannot be split is named in the log, once for each kind of layer.
    """
    prepared = 0
    delayed: list[Delayed] = []
    whole: dict[str, int] = {}
    for layer in module.modules():
        matrices = [p for p in layer.parameters(recurse=False) if p.requires_grad and p.dim() > 1]
        kind = type(layer)
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and vars(kind).get("_forward_impl") in _STOCK:
            layer.weight_grad_store = store
            layer._forward_impl = MethodType(_forward_impl, layer)
            prepared += 1
        elif _delays(layer):
            delayed.append(layer.backward_dw)  # type: ignore[arg-type] # a method, which torch's types do not know
        elif isinstance(layer, nn.Linear) and kind.forward is nn.Linear.forward:
            prepared += split_linears(layer, store)
        elif matrices:
            whole[kind.__name__] = whole.get(kind.__name__, 0) + 1
    if whole:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(whole.items()))
        logger.info("dualpipe: the weight gradients of these layers are computed in B, not in W: %s", names)
    return Split(prepared, tuple(delayed))


_STOCK = (ColumnParallelLinear._forward_impl, RowParallelLinear._forward_impl)


def _delays(layer: nn.Module) -> bool:
    """Whether the layer keeps its weight gradient for ``backward_dw``, as Transformer Engine's do when told to."""
    waiting = getattr(layer, "wgrad_store", None)
    return callable(getattr(layer, "backward_dw", None)) and waiting is not None and waiting.delay_wgrad_compute()
