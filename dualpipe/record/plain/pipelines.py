"""Gradients that are summed over all pipelines of a job, as with data parallelism."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualpipe.record.plain.gradients import Agreement, Parts
from dualpipe.record.plain.links import ROUNDING


def agreement_over(
    parameters: Sequence[tuple[Tensor, Sequence[Parts]]], two_lanes: bool, counts: Sequence[int]
) -> Agreement | None:
    """How the gradients of a chunk agree with the sums over pipelines, of one lane or of both.

    ``parameters`` has the program's gradient of each parameter, and its parts in every pipeline.  ``counts`` are the
    numbers by which a program may divide the sums.  Returns ``None`` unless one factor gives all gradients.
    """
    pipelines = max((len(every) for _, every in parameters), default=0)
    for of_both in (False, True)[: 1 + two_lanes]:
        pairs = [(final.double(), _total(final, every, of_both)) for final, every in parameters]
        if any(total is None or total.shape != final.shape for final, total in pairs):
            continue
        known = [(final, total) for final, total in pairs if total is not None]
        size = sum(float(total.square().sum()) for _, total in known)
        scale = sum(float((final * total).sum()) for final, total in known) / size if size else 0.0
        if scale <= 0 or any(_differ(final, scale * total) for final, total in known):
            continue
        by = next((count for count in counts if abs(scale * count - 1) <= ROUNDING), None)
        over = f"summed over{' both lanes of' * of_both} {pipelines} pipelines"
        how = f"scaled by {scale:.4g}" if by is None else f"divided by {by}" if by > 1 else ""
        return Agreement(
            f"{over}{' and ' * bool(how)}{how}, up to rounding",
            of_both if two_lanes else None,
            scale if by is None else 1.0,
            pipelines=pipelines,
        )
    return None


def _total(final: Tensor, every: Sequence[Parts], of_both: bool) -> Tensor | None:
    totals = [parts.total(final, of_other=far) for parts in every for far in (False, True)[: 1 + of_both]]
    there = [total.double() for total in totals if total is not None]
    return torch.stack(there).sum(0) if there and len({total.shape for total in there}) == 1 else None


def _differ(final: Tensor, total: Tensor) -> bool:
    return float((final - total).abs().max()) > ROUNDING * float(total.abs().max())
