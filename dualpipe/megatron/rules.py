"""The settings of Megatron that DualPipe cannot train with, as a table of rules.

A rule reads attributes by name, from an ``argparse`` namespace or from a ``TransformerConfig`` and a
``DistributedDataParallelConfig``.  An absent attribute counts as not set, so one table serves both.  The reasons in
``because`` are from megatron-core 0.16.1 or Megatron-LM's main branch.
"""

from __future__ import annotations

from functools import partial

from dualpipe.megatron.checks import (
    Settings,
    checkpoint_format,
    clips_shards,
    either,
    first,
    fp8_history,
    has_any,
    is_above_one,
    is_given,
    is_other_than,
    is_set,
    mtp_before_last_stage,
    odd_pipeline,
    ties_and_predicts,
    virtual_pipeline,
)
from dualpipe.megatron.microbatches import batch_problem
from dualpipe.megatron.placement import Schedules
from dualpipe.megatron.violations import Rule, Violation, broken
from dualpipe.schedule.generate import LateW


def violations(*objects: object | None, schedule: str = Schedules.DUALPIPE) -> tuple[Violation, ...]:
    """Every rule of the schedule that the settings break, in the order of the table."""
    v = schedule == Schedules.DUALPIPEV
    return broken(RULES, Settings(*objects), v) + (broken(RULES_V, Settings(*objects), v) if v else ())


def refused_upstream(args: object) -> tuple[Violation, ...]:
    """Settings that are trained exactly here, and that the upstream pull request refuses."""
    return broken(UPSTREAM, Settings(args), False)


_UNRELEASED = "no release of megatron-core has it, so DualPipeV has not been run with it"

RULES: tuple[Rule, ...] = (
    # The shape of the pipeline
    Rule(
        "the pipeline size must be even and at least 2",
        "each rank holds a stage and its mirror image",
        odd_pipeline,
        "set --pipeline-model-parallel-size to 2, 4, 6 or more",
        v=None,
    ),
    Rule(
        "no virtual pipeline",
        "the two chunks of a rank are on two lanes, not two parts of one",
        virtual_pipeline,
        "leave out --num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank",
        v="a rank of DualPipeV holds both ends of a V, not two parts of a loop",
    ),
    Rule(
        "DualPipe and DualPipeV exclude each other",
        "they place stages differently",
        is_set("use_dualpipev"),
        "leave out --use-dualpipev",
        v=None,
    ),
    Rule(
        "the number of microbatches must be even and at least twice the pipeline size",
        "half go each way, and each way fills the pipeline",
        batch_problem,
        "change --global-batch-size, --rampup-batch-size or --micro-batch-size",
        v=None,
    ),
    Rule(
        f"dualpipe_late_w is {', '.join(LateW)}",
        "these are the variants of the schedule",
        first(lambda value: bool(value) and value not in tuple(LateW), "dualpipe_late_w"),
        "correct --dualpipe-late-w",
    ),
    # The model
    Rule(
        "multi-token prediction layers must be on the last stage",
        "only the first and the last stage sum their copies of the embedding",
        mtp_before_last_stage,
        "put every m of --pipeline-model-parallel-layout into its last part",
    ),
    Rule(
        "no checkpoints of a model with tied embeddings and multi-token prediction",
        "megatron-core 0.16.1 cannot write them, under its own schedules either: the last stage keeps an output layer "
        "that has no use",
        ties_and_predicts("save", "load"),
        "set --untie-embeddings-and-output-weights",
    ),
    Rule(
        "no overlapped reduction with tied embeddings and multi-token prediction",
        "megatron-core 0.16.1 keeps an output layer without a use on the last stage and waits for its gradient, under "
        "its own schedules too",
        ties_and_predicts("overlap_grad_reduce"),
        "leave out --overlap-grad-reduce, or set --untie-embeddings-and-output-weights",
    ),
    Rule(
        "the model must be a single decoder",
        "a stage receives one tensor, from the stage before it",
        either(
            is_given("decoder_seq_length", "decoder_num_layers", "pipeline_model_parallel_split_rank"),
            is_set("encoder_pipeline_model_parallel_size"),
        ),
        "train encoder-decoder models without --use-dualpipe",
    ),
    Rule(
        "no hyper-connections",
        "they send several residual streams in one tensor",
        is_set("enable_mhc_connections"),
        "leave out --enable-mhc-connections",
    ),
    Rule(
        "no initialization on the meta device",
        "the replicas of a stage are made equal as they are built",
        is_set("init_model_with_meta_device"),
        "leave out --init-model-with-meta-device",
        v="it delays the initialization to FSDP, and each chunk is wrapped in Megatron's DDP",
    ),
    Rule(
        "no vision pretraining",
        "its teacher is updated on the first model chunk only",
        is_set("vision_pretraining"),
        "train it without --use-dualpipe",
    ),
    # Mixture of experts
    Rule(
        "no quantile balancing",
        "its averages are over data-parallel ranks, which lack the other lane's replica of the stage",
        has_any("moe_router_load_balancing_type", "quantile_balancing"),
        "set --moe-router-load-balancing-type to aux_loss, seq_aux_loss, global_aux_loss, sinkhorn or none",
        v=_UNRELEASED,
    ),
    Rule(
        "no paged stash of expert activations",
        "on overflow it reruns one of Megatron's own schedules",
        either(is_set("moe_paged_stash"), is_given("moe_expert_rank_capacity_factor")),
        "leave out --moe-paged-stash and --moe-expert-rank-capacity-factor",
    ),
    Rule(
        "no upcycling",
        "it builds a second, dense model with the same builder",
        is_set("moe_use_upcycling"),
        "upcycle first, in a run without --use-dualpipe",
    ),
    # Who runs B and W, and when
    Rule(
        "no deferred weight gradients of the embedding",
        "only Megatron's own schedule runs them",
        is_set("defer_embedding_wgrad_compute"),
        "leave out --defer-embedding-wgrad-compute",
    ),
    Rule(
        "Megatron's own split of B and W must be off",
        "DualPipe decides when each runs",
        is_set("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad", "moe_fb_overlap"),
        "leave out --overlap-moe-expert-parallel-comm and --moe-fb-overlap",
    ),
    Rule(
        "no CUDA graphs of layers or iterations",
        "they are captured in the order of Megatron's own schedule",
        either(is_other_than("cuda_graph_impl", "none"), is_set("enable_cuda_graph", "external_cuda_graph")),
        "set --cuda-graph-impl none",
    ),
    Rule(
        "no offloading of activations",
        "it relies on the order of Megatron's own schedule",
        is_set("cpu_offloading", "fine_grained_activation_offloading"),
        "leave out --cpu-offloading-num-layers and --fine-grained-activation-offloading",
    ),
    Rule(
        "all microbatches must be recomputed alike",
        "the window of partly recomputed microbatches is that of 1F1B",
        is_given("num_microbatches_with_partial_activation_checkpoints"),
        "leave num_microbatches_with_partial_activation_checkpoints out",
    ),
    # Data-parallel groups and the optimizer
    Rule(
        "data parallelism must be Megatron's DDP",
        "FSDP shards over groups with only one lane's replicas of a stage",
        is_set("use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2"),
        "leave out --use-megatron-fsdp and --use-torch-fsdp2",
        v="W calls the hooks of Megatron's DDP, in which each chunk is wrapped",
    ),
    Rule(
        "parameters must be gathered before the forward that needs them",
        "gathering in the optimizer's step is designed for virtual pipelines",
        is_set("overlap_param_gather_with_optimizer_step"),
        "leave out --overlap-param-gather-with-optimizer-step",
    ),
    Rule(
        "parameters must be gathered over the stage's group",
        "the extra groups have only one lane's replicas of a stage",
        is_set("create_all_gather_group"),
        "leave out --create-all-gather-group",
        v="the chunks are built without that group, so the setting would have no effect",
    ),
    Rule(
        "the optimizer must shard by element, not by layer",
        "sharding by layer uses groups with only one lane's replicas of a stage",
        either(is_set("use_layer_wise_distributed_optimizer"), has_any("optimizer", "dist_muon")),
        "choose another --optimizer",
        v="build_dualpipe_optimizer builds those of get_megatron_optimizer alone",
    ),
    Rule(
        "weights must not be sharded across data-parallel ranks",
        "the groups that gather them have only one lane's replicas of a stage",
        is_above_one("gtp_weight_remat_size", "expert_gtp_weight_remat_size"),
        "set --gtp-weight-remat-size and --expert-gtp-weight-remat-size to 1",
        v=_UNRELEASED,
    ),
    Rule(
        "no clipping of query and key weights under the distributed optimizer",
        "megatron-core 0.16.1 clips whole weights and fails on a shard, under its own schedules too",
        clips_shards,
        "leave out --qk-clip or --use-distributed-optimizer",
    ),
    Rule(
        "fp8 scales must come from the current tensor",
        "delayed scaling shares its history over ranks with only one lane's replicas of a stage",
        fp8_history,
        "set --fp8-recipe tensorwise, blockwise or mxfp8",
        v="it needs Transformer Engine and a GPU, and DualPipeV has not been run on one",
    ),
    # The rest of a training program
    Rule(
        "sequences must be split evenly over context-parallel ranks",
        "a hybrid split has its own schedule",
        is_set("hybrid_context_parallel"),
        "leave out --hybrid-context-parallel",
    ),
    Rule(
        "the checkpoint format must be torch_dist",
        "the others name a shard by its pipeline rank, and here two ranks hold it",
        checkpoint_format,
        "set --ckpt-format torch_dist",
        v="the others name a shard by its pipeline rank, and here a rank holds two stages",
    ),
    Rule(
        "no distillation, and no reading or writing of logits",
        "they hook into the last pipeline rank, which has half of the losses",
        is_set("export_kd_teacher_load", "logits_save_dir", "logits_load_dir", "freeze_all_layers"),
        "distil without --use-dualpipe",
        v="they hook into the last pipeline rank, which has none of the losses",
    ),
    Rule(
        "no reinforcement-learning loop",
        "it counts microbatches and calls schedules itself",
        is_set("perform_rl_step"),
        "leave out --perform-rl-step",
    ),
)

RULES_V: tuple[Rule, ...] = (
    Rule(
        "the number of microbatches must be at least twice the pipeline size",
        "they fill the pipeline, which has two stages on each rank",
        partial(batch_problem, lanes=1),
        "change --global-batch-size, --rampup-batch-size or --micro-batch-size",
    ),
)
"""Rules for DualPipeV only."""

UPSTREAM: tuple[Rule, ...] = (
    Rule(
        "embedding and output weights should be untied",
        "the pull request that proposes DualPipe for Megatron refuses tied ones; here they are trained exactly",
        either(
            first(lambda value: value is False, "untie_embeddings_and_output_weights"),
            is_set("share_embeddings_and_output_weights"),
        ),
        "set --untie-embeddings-and-output-weights if the run must be possible there too",
    ),
    Rule(
        "there should be no multi-token prediction",
        "the pull request that proposes DualPipe for Megatron refuses it; here it is trained exactly",
        is_set("mtp_num_layers"),
        "leave out --mtp-num-layers if the run must be possible there too",
    ),
)
