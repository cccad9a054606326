"""What Megatron can be set to and DualPipe can't train, as a table.

A rule reads attributes by name, from an ``argparse`` namespace or a ``TransformerConfig`` and a
``DistributedDataParallelConfig``: one that is absent is taken as not set, so one table judges both.  Each rule's
``because`` is the reason found in megatron-core 0.16.1 or in Megatron-LM's main branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dualpipe.errors import RuleError
from dualpipe.megatron.microbatches import training_problem
from dualpipe.megatron.settings import Settings, holds, is_above_one, is_given, is_other_than, is_set, tell


class Rule(NamedTuple):
    """One line of the table: ``came`` tells what breaks the rule in some settings, or gives ``None``."""

    name: str
    because: str
    got: Callable[[Any], str | None]
    fix: str


class Violation(NamedTuple):
    """A rule that some settings break, what came, and what to set."""

    rule: str
    got: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.got}; {self.fix}"


class SettingsError(RuleError):
    """Settings that DualPipe can't train with: every rule that they break, in ``violations``."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        if len(self.violations) == 1:
            super().__init__(*self.violations[0])
            return
        lines = "".join(f"\n  - {violation}" for violation in self.violations)
        super().__init__(
            "--use-dualpipe trains only what comes out right",
            f"{len(self.violations)} settings don't",
            f"change each of these or leave the flag out{lines}",
        )


def violations(*objects: object | None) -> tuple[Violation, ...]:
    """Every rule that the settings break, in the order of the table."""
    settings = Settings(*objects)
    found = ((rule, rule.got(settings)) for rule in RULES)
    return tuple(Violation(f"{rule.name} ({rule.because})", got, rule.fix) for rule, got in found if got)


def _odd_pipeline(settings: Any) -> str | None:
    size = int(settings.pipeline_model_parallel_size or 1)
    return None if size > 1 and size % 2 == 0 else tell("pipeline_model_parallel_size", size)


def _tied(settings: Any) -> str | None:
    if settings.untie_embeddings_and_output_weights is False:
        return tell("untie_embeddings_and_output_weights", False)
    return is_set("share_embeddings_and_output_weights")(settings)


def _cuda_graphs(settings: Any) -> str | None:
    by_name = is_other_than("cuda_graph_impl", "none")(settings)
    return by_name or is_set("enable_cuda_graph", "external_cuda_graph")(settings)


def _fp8_history(settings: Any) -> str | None:
    delayed = settings.fp8 and settings.fp8_recipe in (None, "delayed")
    return f"fp8 is {settings.fp8!r} with fp8_recipe {settings.fp8_recipe!r}" if delayed else None


def _checkpoint_format(settings: Any) -> str | None:
    writes = settings.save or settings.load or settings.pretrained_checkpoint
    return is_other_than("ckpt_format", "torch_dist")(settings) if writes else None


RULES: tuple[Rule, ...] = (
    # The shape of the pipeline
    Rule(
        "the pipeline size is even and above 1",
        "each rank holds a stage and its mirror image",
        _odd_pipeline,
        "set --pipeline-model-parallel-size to 2, 4, 6 or more",
    ),
    Rule(
        "no virtual pipeline",
        "a rank's two chunks are two lanes, not two parts of one",
        lambda s: (
            is_given("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage")(s)
            or is_above_one("num_virtual_stages_per_pipeline_rank")(s)
        ),
        "leave out --num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank",
    ),
    Rule(
        "one schedule",
        "the two place stages differently",
        is_set("use_dualpipev", "moe_fb_overlap"),
        "leave out --use-dualpipev",
    ),
    Rule(
        "microbatches are even and at least twice the pipeline size",
        "half go each way, and each way fills the pipeline",
        training_problem,
        "change --global-batch-size, --rampup-batch-size or --micro-batch-size",
    ),
    # The model
    Rule(
        "embedding and output weights are two",
        "tied ones are added up between the first and the last rank, which here hold both",
        _tied,
        "set --untie-embeddings-and-output-weights",
    ),
    Rule(
        "no multi-token prediction",
        "its layers use the first stage's embedding on the last stage",
        is_set("mtp_num_layers"),
        "leave out --mtp-num-layers",
    ),
    Rule(
        "one sequence length for all microbatches",
        "both sides of a message know its shape beforehand",
        is_set("variable_seq_lengths"),
        "pad to --seq-length and leave variable_seq_lengths off",
    ),
    Rule(
        "one decoder",
        "a stage receives one tensor, of one sequence length",
        lambda s: (
            is_given("decoder_seq_length", "decoder_num_layers", "pipeline_model_parallel_split_rank")(s)
            or is_set("encoder_pipeline_model_parallel_size")(s)
        ),
        "train encoder-decoder models without --use-dualpipe",
    ),
    Rule(
        "one residual stream",
        "hyper-connections send a tensor of several",
        is_set("enable_mhc_connections"),
        "leave out --enable-mhc-connections",
    ),
    Rule(
        "weights are built where they are compared",
        "the two copies of a stage are made equal as they are built",
        is_set("init_model_with_meta_device"),
        "leave out --init-model-with-meta-device",
    ),
    Rule(
        "no vision pretraining",
        "its teacher is updated on the first model chunk alone",
        is_set("vision_pretraining"),
        "train it without --use-dualpipe",
    ),
    # Mixture of experts
    Rule(
        "load is balanced per microbatch or per sequence",
        "global statistics gather over data-parallel ranks, without the other lane's copy of the stage",
        holds("moe_router_load_balancing_type", "global_aux_loss", "quantile_balancing"),
        "set --moe-router-load-balancing-type to aux_loss, seq_aux_loss, sinkhorn or none",
    ),
    Rule(
        "no paged stash of expert activations",
        "it reruns a schedule of Megatron's own on overflow",
        lambda s: is_set("moe_paged_stash")(s) or is_given("moe_expert_rank_capacity_factor")(s),
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
        "weight gradients of the embedding are not deferred",
        "only Megatron's own schedule drains them",
        is_set("defer_embedding_wgrad_compute"),
        "leave out --defer-embedding-wgrad-compute",
    ),
    Rule(
        "Megatron's own split of B from W is off",
        "DualPipe says when each runs",
        is_set("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad"),
        "leave out --overlap-moe-expert-parallel-comm",
    ),
    Rule(
        "no CUDA graphs of layers or iterations",
        "they are captured in the order of Megatron's own schedule",
        _cuda_graphs,
        "set --cuda-graph-impl none",
    ),
    Rule(
        "activations stay on the device",
        "offloading foresees the order of Megatron's own schedule",
        is_set("cpu_offloading", "fine_grained_activation_offloading"),
        "leave out --cpu-offloading-num-layers and --fine-grained-activation-offloading",
    ),
    Rule(
        "all microbatches recompute alike",
        "the window of those that don't is counted in 1F1B",
        is_given("num_microbatches_with_partial_activation_checkpoints"),
        "leave num_microbatches_with_partial_activation_checkpoints out",
    ),
    # Data-parallel groups and the optimizer
    Rule(
        "Megatron's DDP",
        "FSDP shards over groups that hold one copy of a stage",
        is_set("use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2"),
        "leave out --use-megatron-fsdp and --use-torch-fsdp2",
    ),
    Rule(
        "one instance of the distributed optimizer",
        "part of a stage's group would hold one lane alone",
        is_above_one("num_distributed_optimizer_instances"),
        "leave out --num-distributed-optimizer-instances",
    ),
    Rule(
        "parameters are gathered before the forward that needs them",
        "gathering in the optimizer's step is made for virtual pipelines",
        is_set("overlap_param_gather_with_optimizer_step"),
        "leave out --overlap-param-gather-with-optimizer-step",
    ),
    Rule(
        "parameters are gathered over the stage's group",
        "the extra groups hold one copy of a stage",
        is_set("create_all_gather_group"),
        "leave out --create-all-gather-group",
    ),
    Rule(
        "the optimizer shards by element, not by layer",
        "sharding by layer uses groups that hold one copy of a stage",
        lambda s: is_set("use_layer_wise_distributed_optimizer")(s) or holds("optimizer", "dist_muon")(s),
        "choose another --optimizer",
    ),
    Rule(
        "weights are not sharded across data-parallel ranks",
        "the groups that gather them hold one copy of a stage",
        is_above_one("gtp_weight_remat_size", "expert_gtp_weight_remat_size"),
        "set --gtp-weight-remat-size and --expert-gtp-weight-remat-size to 1",
    ),
    Rule(
        "query and key weights are not clipped",
        "the largest logit is taken over one copy's tokens, so the two copies would part",
        is_set("qk_clip"),
        "leave out --qk-clip",
    ),
    Rule(
        "fp8 scales come from the tensor at hand",
        "delayed scaling shares its history over ranks that hold one copy of a stage",
        _fp8_history,
        "set --fp8-recipe tensorwise, blockwise or mxfp8",
    ),
    # The rest of a training program
    Rule(
        "sequences are split evenly over context-parallel ranks",
        "a hybrid split has its own schedule",
        is_set("hybrid_context_parallel"),
        "leave out --hybrid-context-parallel",
    ),
    Rule(
        "checkpoints are torch_dist",
        "the others name a shard by its pipeline rank, and here two ranks hold it",
        _checkpoint_format,
        "set --ckpt-format torch_dist",
    ),
    Rule(
        "no distillation and no reading or writing of logits",
        "they hook into the last pipeline rank, where half the losses are",
        is_set("export_kd_teacher_load", "logits_save_dir", "logits_load_dir", "freeze_all_layers"),
        "distil without --use-dualpipe",
    ),
    Rule(
        "no reinforcement learning loop",
        "it counts microbatches and calls schedules in its own way",
        is_set("perform_rl_step"),
        "leave out --perform-rl-step",
    ),
)
