"""Verifies the drop-in on Megatron: it and the single-process oracle are compared with Megatron's own 1F1B."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dualpipe.errors import UndecidedError
from reference.launch import Context, Failure, launch
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
from reference.megatron.trace import StepTrace, merge
from reference.party import Party, Progress

TRUTH, PRODUCTION, ORACLE = "1F1B", "DualPipe", "plain PyTorch"
Body = Callable[[Case, Context], list[StepTrace]]


@dataclass(frozen=True)
class Normed(Party):
    """A party with the gradient norms of its optimizer.

    ``norm_difference``: their largest relative difference from the truth's; NaN if the party failed.  Under the
    distributed optimizer, norms that differ by rounding count as equal, see ``Case.norm_rounding``.
    """

    norm_difference: float = math.nan

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "norm_difference": None if self.failures else self.norm_difference}


@dataclass(frozen=True)
class Report:
    """The outcome of a verification."""

    case: Case
    truth: tuple[StepTrace, ...]
    complaints: tuple[str, ...]
    parties: tuple[Normed, ...]
    seconds: float

    @property
    def equal(self) -> bool:
        return not self.complaints and all(party.equal for party in self.parties)

    @property
    def exit_code(self) -> int:
        return 0 if self.equal else 1

    @property
    def losses(self) -> list[float]:
        """The mean loss per token of each step, in nats."""
        return [mean_loss(step) for step in self.truth]

    @property
    def norms(self) -> list[float]:
        """The gradient norm before each step of the optimizer."""
        return [next(iter(step.norms.values())) for step in self.truth]

    def as_json(self) -> dict[str, Any]:
        case = self.case
        return {
            "model": str(case.model),
            "pp": case.pp,
            "dp": case.dp,
            "tp": case.tp,
            "ep": case.ep,
            "microbatches": case.count,
            "sequence_parallel": case.sequence_parallel,
            "overlap_grad_reduce": case.overlap_grad_reduce,
            "distributed_optimizer": case.distributed_optimizer,
            "recompute": case.recompute,
            "per_token_loss": case.per_token_loss,
            "expert_bias": case.expert_bias,
            "dropout": case.dropout,
            "dtype": case.dtype,
            "clip": case.clip_norm,
            "steps": case.steps,
            "verdict": "equal" if self.equal else "different",
            "losses": self.losses,
            "gradient_norms": self.norms,
            "tensors": tensors_compared(self.truth),
            "complaints": list(self.complaints),
            "parties": {party.name: party.as_json() for party in self.parties},
            "seconds": round(self.seconds, 3),
        }


def verify(
    case: Case,
    on_progress: Progress = lambda party, rank, steps: None,
    production_body: Body = production.run_rank,
) -> Report:
    """Run each implementation in turn, in processes forked from this one, and compare them with the truth.

    The oracle runs if one process can compute the case (``Case.has_oracle``).  Raises ``UndecidedError`` if Megatron
    itself fails.  A test may pass a faulty ``production_body``.
    """
    started = time.monotonic()

    def run(name: str, body: Body, ranks: int) -> tuple[list[StepTrace], tuple[Failure, ...], float]:
        outcome = launch(ranks, partial(body, case), case.limit, on_progress=partial(on_progress, name))
        traces = [] if outcome.failures else merge(outcome.values())
        return traces, outcome.failures, outcome.seconds

    true, failures, _ = run(TRUTH, truth.run_rank, truth.ranks(case))
    if failures:
        described = "; ".join(map(str, failures))
        raise UndecidedError(f"Megatron's own 1F1B did not finish, so there is no verdict: {described}")

    def compare(name: str, body: Body, ranks: int, kinds: Sequence[str] = KINDS) -> Normed:
        found, failures, seconds = run(name, body, ranks)
        if failures:
            return Normed(name, (), failures, seconds)
        different = tuple(differences(case, true, found, kinds))
        return Normed(name, different, (), seconds, norm_difference=norm_difference(true, found))

    parties = [compare(PRODUCTION, production_body, production.ranks(case))]
    if case.has_oracle:
        kinds = KINDS[:2] if case.distributed_optimizer else KINDS  # the oracle shards nothing
        parties.append(compare(ORACLE, oracle.run, 1, kinds))
    return Report(case, tuple(true), tuple(failed_sanity_checks(true)), tuple(parties), time.monotonic() - started)
