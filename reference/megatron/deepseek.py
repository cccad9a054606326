"""A miniature of DeepSeek-V3 (arXiv 2412.19437) in Megatron's terms, each part of which can be left out."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
from torch import Tensor, nn

from reference.megatron.case import Case, Part

_LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 8,
    "rope_type": "rope",
    "apply_rope_fusion": False,
    "qk_layernorm": True,
}


def options(case: Case) -> dict[str, Any]:
    """Fields of the ``TransformerConfig``: sigmoid routing with a balance loss per sequence, and the parts."""
    chosen: dict[str, Any] = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": nn.functional.silu,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_token_dispatcher_type": "alltoall",
        "moe_layer_freq": [int(layer > 0 or Part.DENSE not in case.parts) for layer in range(case.layers)],
    }
    if Part.MLA in case.parts:
        chosen |= _LATENT
    if case.qk_clip:
        chosen |= {"qk_clip": True, "qk_clip_threshold": case.qk_threshold}
    if Part.SHARED in case.parts:
        chosen["moe_shared_expert_intermediate_size"] = case.hidden
    if Part.GROUPS in case.parts:
        chosen |= {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
    return chosen


def layer_specs(config: Any, stage: int) -> tuple[Any, Any]:
    """The layers of a stage, and the multi-token prediction layer, which is a mixture of experts."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, pp_rank=stage
    )
    mtp_layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
    )
    if config.multi_latent_attention:
        for layer in (*block.layer_specs, mtp_layer):
            layer.submodules.self_attention.submodules.core_attention = LatentAttention
    return block, mtp_layer


class LatentAttention(nn.Module):
    """Causal attention whose queries and keys have another head size than its values.

    Megatron's own attention for that is Transformer Engine's; its local one has a single head size.  As Transformer
    Engine's does, it records the largest logit of each head since the last clipping, float32 ``[heads]``, for
    ``qk_clip``.
    """

    current_max_attn_logits: Tensor | None = None

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.records, self.context = config.qk_clip, pg_collection.cp
        self.scale = softmax_scale or 1 / math.sqrt(k_channels or config.kv_channels)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **options: Any) -> Tensor:
        """All are ``[sequence, batch, heads, size]``; returns ``[sequence, batch, heads x size of a value]``.

        A context-parallel rank has its part of the sequence, and gathers the keys and values of all parts.
        """
        parts = [_positions(rank, self.context.size(), len(query)) for rank in range(self.context.size())]
        if len(parts) > 1:
            key, value = (_gather(each, self.context) for each in (key, value))
        q, k, v = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        scores = torch.matmul(q, k.transpose(-1, -2)).float() * self.scale
        own, whole = parts[self.context.rank()].to(scores.device), torch.cat(parts).to(scores.device)
        later = whole[None, :] > own[:, None]
        scores = scores.masked_fill(later, float("-inf"))
        if self.records:
            largest, before = scores.detach().amax((0, 2, 3)), self.current_max_attn_logits
            self.current_max_attn_logits = largest if before is None else torch.maximum(before, largest)
        weights = scores.softmax(-1).to(v.dtype)
        return torch.matmul(weights, v).permute(2, 0, 1, 3).flatten(2)


def _positions(rank: int, ranks: int, length: int) -> Tensor:
    """Where a context-parallel rank's tokens are in the sequence: int64 ``[length]``.

    Megatron cuts a sequence into twice as many blocks as ranks, and rank r has blocks r and 2 x ranks - 1 - r.
    """
    half = length // 2 if ranks > 1 else length
    blocks = (rank, 2 * ranks - 1 - rank) if ranks > 1 else (0,)
    return torch.cat([torch.arange(block * half, (block + 1) * half) for block in blocks])


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The parts of all ranks of the group, one after the other."""
    gathered: Tensor = _Gathered.apply(tensor, group)  # type: ignore[no-untyped-call] # torch's own
    return gathered


class _Gathered(torch.autograd.Function):
    """Gathers the parts of all ranks; a part's gradient is the sum of those on all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed.chunk(ctx.group.size())[ctx.group.rank()], None
