"""Gradients of a whole chunk as one factor times sums: over lanes, over pipelines, with those of tied weights.

With data parallelism a gradient is summed over all pipelines of a job.  Clipping multiplies all gradients of the model
by one factor.  So the factor of a chunk is taken from its largest gradient, and must give all of them.
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
                factor=None if two_lanes and pipelines > 1 else scale,
                pipelines=pipelines,
                copies=frozenset(number for number, tie in ties.items() if tie.stage < stage),
            )
    return None


Replica = Mapping[str, tuple[Tensor, Tensor]]
"""By name, the program's gradients on one replica of a stage, and its own sums over microbatches."""


def factor_of_shards(replicas: Sequence[Replica], by: int) -> float | None:
    """The factor of the sums that replicas of a stage hold in shards, as ZeRO does; ``None`` if they do not.

    Every element, times ``by``, must be the sum over all replicas times the factor on exactly one of them, and the
    replica's own on the others.  Every replica must hold a shard.  The factor is that of clipping, or 1.
    """
    if len(replicas) < 2 or any(each.keys() != replicas[0].keys() for each in replicas):
        return None
    pairs = [[each[name] for each in replicas] for name in replicas[0]]
    if any(len({*(final.shape for final, _ in each), *(own.shape for _, own in each)}) > 1 for each in pairs):
        return None
    factor = _factor_of_sums(pairs, by)
    if factor is None or not 0 < factor < 1 + ROUNDING:
        return None
    holds = [False] * len(replicas)
    for each in pairs:
        finals, owns, total, near = _opened(each, by)
        summed = [(final - factor * total).abs() <= near for final in finals]
        apart = [(final - own).abs() <= near for final, own in zip(finals, owns, strict=True)]
        if not all(bool((one | other).all()) for one, other in zip(summed, apart, strict=True)):
            return None
        clear = torch.stack([(own - factor * total).abs() > 2 * near for own in owns]).all(0)
        if not bool((torch.stack(summed).sum(0)[clear] == 1).all()):
            return None
        holds = [held or bool((one & clear).any()) for held, one in zip(holds, summed, strict=True)]
    return factor if all(holds) else None


def _factor_of_sums(pairs: Sequence[Sequence[tuple[Tensor, Tensor]]], by: int) -> float | None:
    """The usual ratio of the elements that are not a replica's own to the sums."""
    ratios = []
    for each in pairs:
        finals, owns, total, near = _opened(each, by)
        large = total.abs() > 0.1 * total.abs().max()
        ratios += [
            (final / total)[large & ((final - own).abs() > near)] for final, own in zip(finals, owns, strict=True)
        ]
    every = torch.cat(ratios)
    return float(every.median()) if every.numel() else None


def _opened(each: Sequence[tuple[Tensor, Tensor]], by: int) -> tuple[list[Tensor], list[Tensor], Tensor, float]:
    """The gradients of a parameter times ``by``, the replicas' own, their sum, and how far rounding may be off."""
    finals, owns = [final.double() * by for final, _ in each], [own.double() for _, own in each]
    total = torch.stack(owns).sum(0)
    return finals, owns, total, ROUNDING * float(total.abs().max())


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
