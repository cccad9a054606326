"""Statistics of a step that layers collect in their forwards, combined over both replicas of a stage.

Megatron combines them over the data-parallel ranks before it uses them.  Under DualPipe those ranks hold one lane's
replicas of a stage, so the numbers are combined over the pair of ranks with the same stages first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn


def combine_over_lanes(model: Sequence[nn.Module], config: Any, pair: dist.ProcessGroup) -> None:
    """Combine the statistics of both replicas of each of the rank's stages; collective over ``pair``.

    It sums the tokens per expert, from which routers set their expert bias, and takes the maximum of the attention
    logits of each head, by which Megatron clips query and key weights.  Sums of counts and maxima are exact, so the
    result has the same bits as under 1F1B.
    """
    if config.moe_router_enable_expert_bias:
        for counts in _found(model, "local_tokens_per_expert"):
            dist.all_reduce(counts, group=pair)
    if has_largest_logits(config):
        for logits in _found(model, "current_max_attn_logits"):
            dist.all_reduce(logits, op=dist.ReduceOp.MAX, group=pair)


def has_largest_logits(config: Any) -> bool:
    """Whether attention layers record their largest logits; a Megatron before 0.16 has no such setting."""
    return bool(getattr(config, "qk_clip", False) or getattr(config, "log_max_attention_logit", False))


def _found(model: Sequence[nn.Module], name: str) -> Iterator[Tensor]:
    """That attribute of each layer that has it, in the order of the chunks and of their layers."""
    for module in model:
        for layer in get_attr_wrapped_model(module, "modules")():
            value = getattr(layer, name, None)
            if value is not None:
                yield value
