"""Gradients of a whole chunk as one factor times sums: over lanes, over pipelines, with those of tied weights.

With data parallelism the sum is over all pipelines of a job.  Clipping multiplies all gradients of the model by one
factor.  So the factor of a chunk is taken from its largest gradient, and must give all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dualpipe.record.plain.gradients import Agreement, Parts
from dualpipe.record.plain.links import ROUNDING


@dataclass(frozen=True)
class Partner:
    """A parameter of another stage with the same values; ``words`` say that it is tied, ``every`` is its parts."""

    words: str
    stage: int
    every: Sequence[Parts]


@dataclass(frozen=True)
class Summed:
    """A parameter: the program's gradient, its parts in every pipeline, and the parameters to which it may be tied."""

    number: int
    final: Tensor
    every: Sequence[Parts]
    partners: Callable[[], Iterable[Partner]]


def agreement_of_all(
    parameters: Sequence[Summed], stage: int, two_lanes: bool, counts: Sequence[int]
) -> Agreement | None:
    """How the gradients of a stage agree with the sums of one lane or of both; ``None`` unless one factor gives all.

    ``counts`` are the numbers by which a program may divide the sums.
    """
    for of_both in (False, True)[: 1 + two_lanes]:
        if found := _fitted(parameters, stage, of_both):
            scale, ties = found
            by = next((count for count in counts if abs(scale * count - 1) <= ROUNDING), None)
            pipelines = max(len(each.every) for each in parameters)
            over = ["both lanes"] * of_both + [f"{pipelines} pipelines"] * (pipelines > 1)
            how = [f"summed over {' of '.join(over)}"] if over else []
            how += [f"scaled by {scale:.4g}" if by is None else f"divided by {by}"] if by != 1 else []
            return Agreement(
                "; ".join([*(tie.words for tie in ties.values()), f"{' and '.join(how) or 'equal'}, up to rounding"]),
                of_both if two_lanes else None,
                scale if by is None else 1.0,
                pipelines=pipelines,
                copies=frozenset(number for number, tie in ties.items() if tie.stage < stage),
            )
    return None


def are_shards(replicas: Sequence[Mapping[str, tuple[Tensor, Tensor]]], by: int) -> bool:
    """Whether replicas of a stage hold the sum of their gradients, divided by a number, in shards, as ZeRO does.

    Each has, by name, the program's gradients and its own sums over microbatches.  Every element must be the sum over
    all replicas on exactly one of them, and the replica's own on the others.  Every replica must hold a shard.
    """
    holds = [False] * len(replicas)
    for name in replicas[0]:
        if any(name not in each or each[name][0].shape != each[name][1].shape for each in replicas):
            return False
        finals = [each[name][0].double() * by for each in replicas]
        owns = [each[name][1].double() for each in replicas]
        if len({own.shape for own in owns}) > 1:
            return False
        total = torch.stack(owns).sum(0)
        near = ROUNDING * float(total.abs().max())
        summed = [(final - total).abs() <= near for final in finals]
        apart = [(final - own).abs() <= near for final, own in zip(finals, owns, strict=True)]
        clear = torch.stack([(own - total).abs() > 2 * near for own in owns]).all(0)
        if not all(bool((one | other).all()) for one, other in zip(summed, apart, strict=True)):
            return False
        if not bool((torch.stack(summed).sum(0)[clear] == 1).all()):
            return False
        holds = [held or bool((one & clear).any()) for held, one in zip(holds, summed, strict=True)]
    return len(replicas) > 1 and all(holds)


def _fitted(parameters: Sequence[Summed], stage: int, of_both: bool) -> tuple[float, dict[int, Partner]] | None:
    """The factor, and the parameters that are tied to others."""
    totals = [_total(each.final, each.every, of_both) for each in parameters]
    if any(total is None or total.shape != each.final.shape for total, each in zip(totals, parameters, strict=True)):
        return None
    known = [
        (each, each.final.double(), total) for each, total in zip(parameters, totals, strict=True) if total is not None
    ]
    scale = _scale((final, total) for _, final, total in known)
    if scale is None:
        return None
    ties = {}
    for each, final, total in known:
        if _differ(final, scale * total):
            fitting = (
                partner
                for partner in each.partners()
                if (theirs := _total(each.final, partner.every, of_both)) is not None
                and theirs.shape == total.shape
                and not _differ(final, scale * (total + theirs))
            )
            tie = next(fitting, None)
            if tie is None:
                return None
            ties[each.number] = tie
    return scale, ties


def _scale(pairs: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """The factor of the largest gradient that is a part of its sum, as clipping and division leave."""
    found: dict[float, float] = {}  # size of the sum -> factor
    for final, total in pairs:
        size = float(total.square().sum())
        factor = float((final * total).sum()) / size if size else 0.0
        if 0 < factor < 1 + ROUNDING and not _differ(final, factor * total):
            found[size] = factor
    return found[max(found)] if found else None


def _total(final: Tensor, every: Sequence[Parts], of_both: bool) -> Tensor | None:
    totals = [parts.total(final, of_other=far) for parts in every for far in (False, True)[: 1 + of_both]]
    there = [total.double() for total in totals if total is not None]
    return torch.stack(there).sum(0) if there and len({total.shape for total in there}) == 1 else None


def _differ(final: Tensor, total: Tensor) -> bool:
    return float((final - total).abs().max()) > ROUNDING * float(total.abs().max())
