"""The settings of Megatron that DualPipe cannot train with, as a table of rules.

A rule reads attributes by name, from an ``argparse`` namespace or from a ``TransformerConfig`` and a
``DistributedDataParallelConfig``.  An absent attribute counts as not set, so one table serves both.  The reasons in
``because`` are from megatron-core 0.16.1 or Megatron-LM's main branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dualpipe.errors import RuleError
from dualpipe.megatron.microbatches import batch_problem
from dualpipe.schedule.generate import LateW

Check = Callable[[Any], "str | None"]
"""Describes the setting that breaks a rule, or returns ``None``."""


class Rule(NamedTuple):
    """A line of the table; ``got`` describes the setting that breaks the rule, or returns ``None``."""

    name: str
    because: str
    got: Check
    fix: str


class Violation(NamedTuple):
    """A broken rule with its reason, the setting that breaks it, and how to fix it."""

    rule: str
    got: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.got}; {self.fix}"


class SettingsError(RuleError):
    """Settings that DualPipe cannot train with; ``violations`` has every rule that they break."""

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        if len(self.violations) == 1:
            super().__init__(*self.violations[0])
            return
        lines = "".join(f"\n  - {violation}" for violation in self.violations)
        super().__init__(
            f"--use-dualpipe is incompatible with {len(self.violations)} settings",
            "they are listed below",
            f"change each of them or leave out the flag{lines}",
        )


class Settings:
    """Several objects read as one: an attribute is that of the first object that has it, else ``None``."""

    def __init__(self, *objects: object | None) -> None:
        self._objects = [each for each in objects if each is not None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return next((getattr(each, name) for each in self._objects if hasattr(each, name)), None)


def violations(*objects: object | None) -> tuple[Violation, ...]:
    """Every rule that the settings break, in the order of the table."""
    settings = Settings(*objects)
    found = ((rule, rule.got(settings)) for rule in RULES)
    return tuple(Violation(f"{rule.name} ({rule.because})", got, rule.fix) for rule, got in found if got)


def _first(wrong: Callable[[Any], bool], *names: str) -> Check:
    """The first of these settings whose value is wrong, with its value."""

    def describe(settings: Any) -> str | None:
        values = ((name, getattr(settings, name)) for name in names)
        return next((f"{name} is {value!r}" for name, value in values if wrong(value)), None)

    return describe


def _is_set(*names: str) -> Check:
    return _first(bool, *names)


def _is_given(*names: str) -> Check:
    """Not ``None``; 0 counts as given."""
    return _first(lambda value: value is not None, *names)


def _is_above_one(*names: str) -> Check:
    return _first(lambda value: (value or 1) > 1, *names)


def _is_other_than(name: str, *allowed: object) -> Check:
    return _first(lambda value: value is not None and value not in allowed, name)


def _has_any(name: str, *words: str) -> Check:
    """One of these words, or a list with one of them."""
    return _first(lambda value: not {*words}.isdisjoint([value] if isinstance(value, str) else value or ()), name)


def _either(*checks: Check) -> Check:
    return lambda settings: next(filter(None, (check(settings) for check in checks)), None)


def _odd_pipeline(settings: Any) -> str | None:
    size = int(settings.pipeline_model_parallel_size or 1)
    return None if size > 1 and size % 2 == 0 else f"pipeline_model_parallel_size is {size}"


def _fp8_history(settings: Any) -> str | None:
    delayed = settings.fp8 and settings.fp8_recipe in (None, "delayed")
    return f"fp8 is {settings.fp8!r} with fp8_recipe {settings.fp8_recipe!r}" if delayed else None


def _checkpoint_format(settings: Any) -> str | None:
    writes = settings.save or settings.load or settings.pretrained_checkpoint
    return _is_other_than("ckpt_format", "torch_dist")(settings) if writes else None


RULES: tuple[Rule, ...] = (
    # The shape of the pipeline
    Rule(
        "the pipeline size must be even and at least 2",
        "each rank holds a stage and its mirror image",
        _odd_pipeline,
        "set --pipeline-model-parallel-size to 2, 4, 6 or more",
    ),
    Rule(
        "no virtual pipeline",
        "the two chunks of a rank are on two lanes, not two parts of one",
        _either(
            _is_given("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage"),
            _is_above_one("num_virtual_stages_per_pipeline_rank"),
        ),
        "leave out --num-layers-per-virtual-pipeline-stage and --num-virtual-stages-per-pipeline-rank",
    ),
    Rule(
        "DualPipe and DualPipeV exclude each other",
        "they place stages differently",
        _is_set("use_dualpipev", "moe_fb_overlap"),
        "leave out --use-dualpipev",
    ),
    Rule(
        "the number of microbatches must be even and at least twice the pipeline size",
        "half go each way, and each way fills the pipeline",
        batch_problem,
        "change --global-batch-size, --rampup-batch-size or --micro-batch-size",
    ),
    Rule(
        f"dualpipe_late_w is {', '.join(LateW)}",
        "these are the variants of the schedule",
        _first(lambda value: bool(value) and value not in tuple(LateW), "dualpipe_late_w"),
        "correct --dualpipe-late-w",
    ),
    # The model
    Rule(
        "embedding and output weights must be untied",
        "tied weights are reduced between the first and the last rank, and here each of these holds both",
        _either(
            _first(lambda value: value is False, "untie_embeddings_and_output_weights"),
            _is_set("share_embeddings_and_output_weights"),
        ),
        "set --untie-embeddings-and-output-weights",
    ),
    Rule(
        "no multi-token prediction",
        "its layers use the first stage's embedding on the last stage",
        _is_set("mtp_num_layers"),
        "leave out --mtp-num-layers",
    ),
    Rule(
        "all microbatches must have the same sequence length",
        "the receiver of a message must know its shape in advance",
        _is_set("variable_seq_lengths"),
        "pad to --seq-length and leave variable_seq_lengths off",
    ),
    Rule(
        "the model must be a single decoder",
        "a stage receives one tensor, of one sequence length",
        _either(
            _is_given("decoder_seq_length", "decoder_num_layers", "pipeline_model_parallel_split_rank"),
            _is_set("encoder_pipeline_model_parallel_size"),
        ),
        "train encoder-decoder models without --use-dualpipe",
    ),
    Rule(
        "no hyper-connections",
        "they send several residual streams in one tensor",
        _is_set("enable_mhc_connections"),
        "leave out --enable-mhc-connections",
    ),
    Rule(
        "no initialization on the meta device",
        "the replicas of a stage are made equal as they are built",
        _is_set("init_model_with_meta_device"),
        "leave out --init-model-with-meta-device",
    ),
    Rule(
        "no vision pretraining",
        "its teacher is updated on the first model chunk only",
        _is_set("vision_pretraining"),
        "train it without --use-dualpipe",
    ),
    # Mixture of experts
    Rule(
        "load must be balanced per microbatch or per sequence",
        "global statistics are gathered over data-parallel ranks, which lack the other lane's replica of the stage",
        _has_any("moe_router_load_balancing_type", "global_aux_loss", "quantile_balancing"),
        "set --moe-router-load-balancing-type to aux_loss, seq_aux_loss, sinkhorn or none",
    ),
    Rule(
        "no paged stash of expert activations",
        "on overflow it reruns one of Megatron's own schedules",
        _either(_is_set("moe_paged_stash"), _is_given("moe_expert_rank_capacity_factor")),
        "leave out --moe-paged-stash and --moe-expert-rank-capacity-factor",
    ),
    Rule(
        "no upcycling",
        "it builds a second, dense model with the same builder",
        _is_set("moe_use_upcycling"),
        "upcycle first, in a run without --use-dualpipe",
    ),
    # Who runs B and W, and when
    Rule(
        "no deferred weight gradients of the embedding",
        "only Megatron's own schedule runs them",
        _is_set("defer_embedding_wgrad_compute"),
        "leave out --defer-embedding-wgrad-compute",
    ),
    Rule(
        "Megatron's own split of B and W must be off",
        "DualPipe decides when each runs",
        _is_set("overlap_moe_expert_parallel_comm", "overlap_dispatch_backward_with_experts_wgrad"),
        "leave out --overlap-moe-expert-parallel-comm",
    ),
    Rule(
        "no CUDA graphs of layers or iterations",
        "they are captured in the order of Megatron's own schedule",
        _either(_is_other_than("cuda_graph_impl", "none"), _is_set("enable_cuda_graph", "external_cuda_graph")),
        "set --cuda-graph-impl none",
    ),
    Rule(
        "no offloading of activations",
        "it relies on the order of Megatron's own schedule",
        _is_set("cpu_offloading", "fine_grained_activation_offloading"),
        "leave out --cpu-offloading-num-layers and --fine-grained-activation-offloading",
    ),
    Rule(
        "all microbatches must be recomputed alike",
        "the window of partly recomputed microbatches is that of 1F1B",
        _is_given("num_microbatches_with_partial_activation_checkpoints"),
        "leave num_microbatches_with_partial_activation_checkpoints out",
    ),
    # Data-parallel groups and the optimizer
    Rule(
        "data parallelism must be Megatron's DDP",
        "FSDP shards over groups with only one lane's replicas of a stage",
        _is_set("use_megatron_fsdp", "use_custom_fsdp", "use_torch_fsdp2"),
        "leave out --use-megatron-fsdp and --use-torch-fsdp2",
    ),
    Rule(
        "there must be one instance of the distributed optimizer",
        "with several, some groups of a stage would have only one lane's replicas",
        _is_above_one("num_distributed_optimizer_instances"),
        "leave out --num-distributed-optimizer-instances",
    ),
    Rule(
        "parameters must be gathered before the forward that needs them",
        "gathering in the optimizer's step is designed for virtual pipelines",
        _is_set("overlap_param_gather_with_optimizer_step"),
        "leave out --overlap-param-gather-with-optimizer-step",
    ),
    Rule(
        "parameters must be gathered over the stage's group",
        "the extra groups have only one lane's replicas of a stage",
        _is_set("create_all_gather_group"),
        "leave out --create-all-gather-group",
    ),
    Rule(
        "the optimizer must shard by element, not by layer",
        "sharding by layer uses groups with only one lane's replicas of a stage",
        _either(_is_set("use_layer_wise_distributed_optimizer"), _has_any("optimizer", "dist_muon")),
        "choose another --optimizer",
    ),
    Rule(
        "weights must not be sharded across data-parallel ranks",
        "the groups that gather them have only one lane's replicas of a stage",
        _is_above_one("gtp_weight_remat_size", "expert_gtp_weight_remat_size"),
        "set --gtp-weight-remat-size and --expert-gtp-weight-remat-size to 1",
    ),
    Rule(
        "no clipping of query and key weights",
        "the largest logit is taken over one lane's tokens, so the replicas of a stage would diverge",
        _is_set("qk_clip"),
        "leave out --qk-clip",
    ),
    Rule(
        "fp8 scales must come from the current tensor",
        "delayed scaling shares its history over ranks with only one lane's replicas of a stage",
        _fp8_history,
        "set --fp8-recipe tensorwise, blockwise or mxfp8",
    ),
    # The rest of a training program
    Rule(
        "sequences must be split evenly over context-parallel ranks",
        "a hybrid split has its own schedule",
        _is_set("hybrid_context_parallel"),
        "leave out --hybrid-context-parallel",
    ),
    Rule(
        "the checkpoint format must be torch_dist",
        "the others name a shard by its pipeline rank, and here two ranks hold it",
        _checkpoint_format,
        "set --ckpt-format torch_dist",
    ),
    Rule(
        "no distillation, and no reading or writing of logits",
        "they hook into the last pipeline rank, which has half of the losses",
        _is_set("export_kd_teacher_load", "logits_save_dir", "logits_load_dir", "freeze_all_layers"),
        "distil without --use-dualpipe",
    ),
    Rule(
        "no reinforcement-learning loop",
        "it counts microbatches and calls schedules itself",
        _is_set("perform_rl_step"),
        "leave out --perform-rl-step",
    ),
)
