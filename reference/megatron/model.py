"""The models and settings of a case, in Megatron's terms.  Every implementation builds its stages here."""

from __future__ import annotations

import random
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from reference.megatron import deepseek
from reference.megatron.case import Case, Model

_SEED_STEP = 100
"""Megatron's training loop adds this times the pipeline rank to the seed."""
_BUCKET = 4000
"""Elements in a bucket if reduction overlaps: several buckets in a stage, as in a model of real size."""


def transformer_config(case: Case) -> TransformerConfig:
    experts: dict[str, Any] = {}
    if case.has_experts:
        experts = {
            "num_moe_experts": case.experts,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 1e-2,
            "moe_ffn_hidden_size": case.hidden,
            "add_bias_linear": False,  # Megatron has no bias in experts under tensor parallelism
            "expert_model_parallel_size": case.ep,
        }
        if case.balances_by_bias:
            experts |= {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
        if case.overlap_moe:
            experts["moe_token_dispatcher_type"] = "alltoall"
        if case.model is Model.DEEPSEEK:
            experts |= deepseek.options(case)
        if case.global_aux_loss:
            experts["moe_router_load_balancing_type"] = "global_aux_loss"
    if case.variable_lengths:  # Megatron asks for this dispatcher in dense models, too
        experts["moe_token_dispatcher_type"] = "alltoall"
    recompute: dict[str, Any] = {}
    if case.recompute:
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    kind = MLATransformerConfig if "multi_latent_attention" in experts else TransformerConfig
    return kind(
        num_layers=case.layers,
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.stages,
        sequence_parallel=case.sequence_parallel,
        context_parallel_size=case.cp,
        hidden_dropout=case.dropout,
        attention_dropout=case.dropout,
        bf16=case.dtype == "bf16",
        params_dtype=case.torch_dtype,
        pipeline_dtype=case.torch_dtype,
        calculate_per_token_loss=case.per_token_loss,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=False,
        variable_seq_lengths=case.variable_lengths,
        cuda_graph_scope=[],  # the default is deprecated, and warns
        pipeline_model_parallel_layout=case.layers_of_stages,
        mtp_num_layers=case.mtp_layers or None,
        **experts,
        **recompute,
    )


def seed(case: Case, pipeline_rank: int, **ranks: int) -> None:
    """Seed the random generators of a rank as Megatron's training loop does, before it builds its model.

    ``ranks`` are passed to ``model_parallel_cuda_manual_seed``, for a process without parallel groups.
    """
    value = case.seed + _SEED_STEP * pipeline_rank
    random.seed(value)
    torch.manual_seed(value)
    model_parallel_cuda_manual_seed(value, **ranks)


def build_gpt(case: Case, config: TransformerConfig, pre_process: bool, post_process: bool, groups: Any) -> GPTModel:
    """Build the stage that ``groups.pp`` selects, with weights from the current random generators.

    ``parallel_state`` must have that stage as its pipeline rank.
    """
    layers: Any
    if case.model is Model.DEEPSEEK:
        layers, layer = deepseek.layer_specs(config, groups.pp.rank())
    else:
        experts = case.experts if case.has_experts else None
        layers = layer = get_gpt_layer_local_spec(num_experts=experts, moe_grouped_gemm=False)
    mtp = get_gpt_mtp_block_spec(config, layer, use_transformer_engine=False) if case.mtp_layers else None
    rotary = case.model is Model.DEEPSEEK or case.mtp_layers  # no learned positions on the last stage
    return GPTModel(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=case.vocabulary,
        max_sequence_length=case.sequence,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope" if rotary else "learned_absolute",
        mtp_block_spec=mtp,
        pg_collection=groups,
    )


def bucket_limit(case: Case) -> int | None:
    """Elements after which a bucket of gradients is full; without overlap a stage has one bucket."""
    return _BUCKET if case.overlap_grad_reduce else None


def ddp_config(case: Case) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=case.overlap_grad_reduce,
        use_distributed_optimizer=case.distributed_optimizer,
        num_distributed_optimizer_instances=case.instances,
        bucket_size=bucket_limit(case),
    )


def optimizer_config(case: Case) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=case.learning_rate,
        min_lr=0.0,
        weight_decay=case.weight_decay,
        clip_grad=case.clip_norm,
        bf16=case.dtype == "bf16",
        params_dtype=case.torch_dtype,
        use_distributed_optimizer=case.distributed_optimizer,
    )
