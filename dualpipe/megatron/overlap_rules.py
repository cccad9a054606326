"""The settings with which ``--dualpipe-overlap-moe`` cannot overlap the communication of experts, as a table of rules.

The reasons are from megatron-core 0.16.1.  Its own flag, ``overlap_moe_expert_parallel_comm``, is refused with every
schedule of ours, because DualPipe decides when W runs (``dualpipe.megatron.rules``).
"""

from __future__ import annotations

from typing import Any

from dualpipe.megatron.checks import is_given, is_other_than, is_set
from dualpipe.megatron.violations import Rule


def one_expert_rank(settings: Any) -> str | None:
    size = int(settings.expert_model_parallel_size or 1)
    return None if size > 1 else f"expert_model_parallel_size is {size}"


def no_all_to_all(settings: Any) -> str | None:
    kind = settings.moe_token_dispatcher_type
    return None if kind in ("alltoall", "flex") else f"moe_token_dispatcher_type is {kind!r}"


def dense_last_layer(settings: Any) -> str | None:
    frequency, layers = settings.moe_layer_freq, int(settings.num_layers or 0)
    if isinstance(frequency, int) and layers:
        dense = (layers - 1) % frequency != 0
    else:
        dense = isinstance(frequency, (list, tuple)) and not frequency[-1]
    return f"moe_layer_freq is {frequency!r} for {layers} layers" if dense else None


def full_recompute(settings: Any) -> str | None:
    if settings.recompute_granularity == "full":
        return "recompute_granularity is 'full'"
    return is_given("recompute_method", "recompute_num_layers")(settings)


OVERLAP_RULES: tuple[Rule, ...] = (
    Rule(
        "with --dualpipe-overlap-moe experts must be on several ranks",
        "with one rank Megatron's plan frees tensors that the dispatch returned unchanged",
        one_expert_rank,
        "raise --expert-model-parallel-size, or leave out --dualpipe-overlap-moe",
    ),
    Rule(
        "with --dualpipe-overlap-moe tokens must be sent to their experts",
        "Megatron's plan has nodes for the all-to-all or flex dispatcher only",
        no_all_to_all,
        "set --moe-token-dispatcher-type alltoall or flex",
    ),
    Rule(
        "with --dualpipe-overlap-moe layers must not be recomputed as a whole",
        "the nodes of Megatron's plan cut a layer apart",
        full_recompute,
        "set --recompute-granularity selective, without --recompute-method and --recompute-num-layers",
    ),
    Rule(
        "with --dualpipe-overlap-moe the last layer must have experts",
        "Megatron's plan leaves out the final layer norm after a dense one",
        dense_last_layer,
        "end --moe-layer-freq with a layer of experts",
    ),
    Rule(
        "with --dualpipe-overlap-moe shared experts must not overlap by themselves",
        "Megatron's plan places them",
        is_set("moe_shared_expert_overlap"),
        "leave out --moe-shared-expert-overlap",
    ),
    Rule(
        "with --dualpipe-overlap-moe there must be no multi-token prediction",
        "its plan has not been run with deferred weight gradients",
        is_set("mtp_num_layers"),
        "leave out --mtp-num-layers or --dualpipe-overlap-moe",
    ),
    Rule(
        "with --dualpipe-overlap-moe fp8 scales must be of single layers",
        "a delayed recipe surrounds a whole step of one chunk, and a pair runs two",
        lambda settings: (
            is_other_than("fp8_recipe", "tensorwise", "blockwise", "mxfp8")(settings) if settings.fp8 else None
        ),
        "set --fp8-recipe tensorwise, blockwise or mxfp8",
    ),
)
