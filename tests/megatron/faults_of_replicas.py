"""Faults of what both replicas of a stage must share: their weights, gradients and statistics, and the gradient norm.

Each function plants one in the running drop-in; ``tests.megatron.faults`` has their records.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any


def replicas_not_reduced_together() -> None:
    from dualpipe.megatron import groups

    real = groups._collection
    groups._collection = lambda own, stage, stages, embd, **made: real(own, stage, stages, embd=embd)


def norm_counts_both_replicas() -> None:
    from dualpipe.megatron import model

    model._mark_shared = lambda module, chunk: None


def norm_counts_every_optimizer_instance() -> None:
    from dualpipe.megatron.groups import Groups

    Groups.instance = lambda self, chunk: 0


def norm_of_one_stage_only() -> None:
    from dualpipe.megatron import optimizer

    real = optimizer.ProcessGroupCollection

    def one_stage(**groups: Any) -> Any:
        return real(**{**groups, "mp": groups["tp"]})

    one_stage.use_mpu_process_groups = real.use_mpu_process_groups
    optimizer.ProcessGroupCollection = one_stage


def initial_weights_differ() -> None:
    from dualpipe.megatron import model

    model._equalise = lambda module, chunk, groups: None


def logits_of_one_lane() -> None:
    from dualpipe.megatron import statistics

    statistics.has_largest_logits = lambda config: False


def experts_balanced_in_one_lane() -> None:
    from dualpipe.megatron import groups

    real = groups._collection

    def collection(own, stage, stages, embd, **made):
        return real(own, stage, stages, embd=embd, **made | {"tp_dp_cp": own.tp_dp_cp})

    groups._collection = collection


def mirror_chunk_numbered_as_rank_r() -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from dualpipe.megatron import model

    model.building = lambda collection: nullcontext()
    real = model._provide

    def provide(provider, chunk, groups, options):
        own = ProcessGroupCollection.use_mpu_process_groups()
        return real(provider, chunk, replace(groups, chunks=dict.fromkeys(groups.chunks, own)), options)

    model._provide = provide
