"""Verifies the drop-in on Megatron: it and the single-process oracle are compared with Megatron's own 1F1B."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dualpipe.errors import UndecidedError
from dualpipe.progress import Progress, silent
from dualpipe.testing.launch import Context, Failure, launch
from reference.megatron import oracle, production, truth
from reference.megatron.case import Case
from reference.megatron.comparison import (
    KINDS,
    differences,
    failed_sanity_checks,
    mean_loss,
    norm_difference,
    tensors_compared,
)
from reference.megatron.trace import Shard, StepTrace, merge
from reference.report import Comparison, Report, StageSize, of_all_ranks

TRUTH, PRODUCTION, ORACLE = "1F1B", "DualPipe", "plain PyTorch"
Body = Callable[[Case, Context], list[StepTrace]]


@dataclass(frozen=True)
class Normed(Comparison):
    """A comparison that includes the gradient norms of the optimizer.

    ``norm_difference``: their largest relative difference from the truth's; NaN if one failed.  The oracle's may differ
    by rounding under the distributed optimizer, see ``Case.norm_rounding``.
    """

    norm_difference: float = math.nan

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "norm_difference": None if self.failures else self.norm_difference}


def verify(
    case: Case,
    on_progress: Progress = silent,
    production_body: Body = production.run_rank,
) -> Report[Case, Normed]:
    """Run each implementation in turn, each in processes forked from this one, and compare.

    The oracle runs if one process can compute the case (``Case.has_oracle``).  Raises ``UndecidedError`` if Megatron
    itself fails.  A test may pass a faulty ``production_body``.
    """
    started = time.monotonic()

    def run(name: str, body: Body, ranks: int) -> tuple[list[StepTrace], tuple[Failure, ...], float]:
        reported = of_all_ranks(on_progress, name, ranks, case.steps)
        outcome = launch(ranks, partial(body, case), case.limit, on_progress=reported)
        traces = [] if outcome.failures else merge(outcome.values())
        return traces, outcome.failures, outcome.seconds

    true, failures, _ = run(TRUTH, truth.run_rank, truth.ranks(case))
    if failures:
        described = "; ".join(map(str, failures))
        raise UndecidedError(f"Megatron's own 1F1B did not finish, so there is no verdict: {described}")

    def compare(name: str, body: Body, ranks: int, kinds: Sequence[str] = KINDS, rounding: float = 0.0) -> Normed:
        found, failures, seconds = run(name, body, ranks)
        if failures:
            return Normed(name, (), failures, seconds)
        different = tuple(differences(case, true, found, kinds, rounding))
        return Normed(name, different, (), seconds, norm_difference=norm_difference(true, found))

    comparisons = [compare(PRODUCTION, production_body, production.ranks(case))]
    if case.has_oracle:
        kinds = KINDS[:2] if case.distributed_optimizer else KINDS  # the oracle shards nothing
        comparisons.append(compare(ORACLE, oracle.run, 1, kinds, case.norm_rounding))
    return Report(
        case,
        _facts(case),
        tuple(map(mean_loss, true)),
        tensors_compared(true),
        _stage_sizes(case, true[-1]),
        tuple(failed_sanity_checks(case, true)),
        tuple(comparisons),
        time.monotonic() - started,
        tuple(next(iter(step.norms.values())) for step in true),
    )


def _facts(case: Case) -> dict[str, Any]:
    return {
        "model": str(case.model),
        "schedule": case.schedule,
        "pp": case.pp,
        "dp": case.dp,
        "tp": case.tp,
        "ep": case.ep,
        "cp": case.cp,
        "microbatches": case.count,
        "sequence_parallel": case.sequence_parallel,
        "overlap_grad_reduce": case.overlap_grad_reduce,
        "distributed_optimizer": case.distributed_optimizer,
        "optimizer_instances": case.instances,
        "recompute": case.recompute,
        "per_token_loss": case.per_token_loss,
        "expert_bias": case.balances_by_bias,
        "variable_lengths": case.variable_lengths,
        "global_aux_loss": case.global_aux_loss,
        "qk_clip": case.qk_clip,
        "mtp": case.mtp_layers,
        "tied": case.tied,
        "layout": case.layers_of_stages,
        "without": list(case.without),
        "dropout": case.dropout,
        "dtype": case.dtype,
        "clip": case.clip_norm,
        "steps": case.steps,
    }


def _stage_sizes(case: Case, last: StepTrace) -> tuple[StageSize, ...]:
    sizes = []
    for stage in range(case.stages):
        shards = [Shard(0, stage, tp) for tp in range(case.tp)]
        weights = [weight for shard in shards for weight in last.weights[shard].values()]
        gradients = [gradient for shard in shards for gradient in last.gradients[shard].values()]
        sizes.append(StageSize.of(weights, gradients))
    return tuple(sizes)
