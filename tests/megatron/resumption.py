"""Runs training that is interrupted and resumed, each part with DualPipe or 1F1B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dualpipe.megatron import load_checkpoint, save_checkpoint
from dualpipe.testing.launch import Context, launch
from reference.megatron import production, truth
from reference.megatron.case import Case
from reference.megatron.trace import StepTrace, merge

SCHEDULES: dict[str, ModuleType] = {"dualpipe": production, "1f1b": truth}


@dataclass(frozen=True)
class Interruption:
    """A checkpoint in ``folder`` after ``steps`` steps: written there, or, if ``resumes``, loaded from it."""

    folder: Path
    steps: int
    resumes: bool

    def first(self, model: list[Any], optimizer: Any) -> int:
        return int(load_checkpoint(self.folder, model, optimizer)["steps"]) if self.resumes else 0

    def after(self, steps: int, model: list[Any], optimizer: Any) -> None:
        if steps == self.steps and not self.resumes:
            save_checkpoint(self.folder, model, optimizer, {"steps": steps})


def train(
    case: Case,
    schedule: str,
    interruption: Interruption,
    buckets: Mapping[str, Any] | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[StepTrace]:
    """Train with a schedule and return the steps of all ranks.

    ``buckets`` replaces fields of the ``DistributedDataParallelConfig``; ``prepare`` runs first in each process.
    """
    module = SCHEDULES[schedule]

    def rank(context: Context) -> list[StepTrace]:
        of_case, optimizer_of = module.ddp_config, module.optimizer_config  # replaced in forked processes only
        module.ddp_config = lambda case: replace(of_case(case), **(buckets or {}))
        gathers = bool((buckets or {}).get("overlap_param_gather"))
        module.optimizer_config = lambda case: replace(optimizer_of(case), overlap_param_gather=gathers)
        if prepare:
            prepare()
        traces: list[StepTrace] = module.run_rank(case, context, checkpoints=interruption)
        return traces

    return merge(launch(module.ranks(case), rank, case.limit).values())


def weights_that_differ(whole: StepTrace, resumed: StepTrace) -> list[str]:
    """The weights and optimizer's copies of a step that are not bitwise equal, of the replicas that both runs have."""
    return [
        f"{kind} {name} of {shard}"
        for kind in ("weights", "main_weights")
        for shard, tensors in getattr(resumed, kind).items()
        for name, value in tensors.items()
        if not torch.equal(value, getattr(whole, kind)[shard][name])
    ]
