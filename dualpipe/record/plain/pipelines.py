"""The replicas of a stage in the other pipelines of a job: whether gradients are summed over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dualpipe.record.phrases import names_of
from dualpipe.record.plain import links
from dualpipe.record.plain.gradients import Agreement, Parts, equal
from dualpipe.schedule import Chunk

if TYPE_CHECKING:
    from dualpipe.record.plain.step import Step


def summed(step: Step, chunk: Chunk) -> Agreement | None:
    """How the gradients agree if they are those of all pipelines of the job, summed and perhaps divided."""
    file = step.files[step.routes[chunk.lane][chunk.stage]]
    every = [each for each in step.replicas if each.has(chunk)]
    if not every or len(every) < len(step.replicas):
        return None
    of_others = [_by_name(each, chunk) for each in every]
    found: set[int] = set()
    for number, parts in step.parts(chunk).items():
        alike = [named.get(file["names"][number]) for named in of_others]
        final = file["final"][number]
        if final is None or parts.slopes or not all(alike):
            return None
        by = _divisor(final, [parts, *filter(None, alike)], (1, 1 + len(every), *step.counts()))
        if by is None:
            return None
        if bool(final.any()):  # zeros agree with every divisor
            found.add(by)
    if len(found) > 1:
        return None
    shows = bool(found) and len(step.routes) == 1  # with two lanes it may be the sum over one or over both
    by = found.pop() if found else 1
    how = f"summed over {1 + len(every)} pipelines{f' and divided by {by}' if by > 1 else ''}, up to rounding"
    return Agreement(how, divided_by=by, factor=1 / by if shows else None)


def updated_apart(step: Step, chunk: Chunk) -> Iterator[str]:
    """What is not known if the replicas of a stage in several pipelines are different after the step.

    A constant weight may be that of another shard, such as a bias of zeros.
    """
    before, after = step.named(chunk, "weights"), step.named(chunk, "changed")
    for other in step.replicas:
        theirs, later = other.named(chunk, "weights"), other.named(chunk, "changed")
        names = [
            name
            for name in before.keys() & after.keys() & later.keys()
            if equal(before[name], theirs.get(name))
            and bool((before[name] != before[name].flatten()[0]).any())
            and not equal(after[name], later[name])
        ]
        if names:
            yield (
                "its weights are those of another pipeline before the step, and not after it: "
                f"{names_of(sorted(names))}. Are the gradients summed over the pipelines?"
            )
            return


def _divisor(final: Tensor, every: Sequence[Parts], counts: Sequence[int]) -> int | None:
    """By what a gradient is divided that is otherwise the sum over pipelines, of one lane or of both."""
    for of_both in (False, True):
        totals = [parts.total(final, of_other=far) for parts in every for far in (False, True)[: 1 + of_both]]
        there = [total.double() for total in totals if total is not None]
        if not there or any(total.shape != final.shape for total in there):
            continue
        total = torch.stack(there).sum(0)
        for by in counts:
            if float((final.double() * by - total).abs().max()) <= links.ROUNDING * float(total.abs().max()):
                return by
    return None


def _by_name(step: Step, chunk: Chunk) -> Mapping[str, Parts]:
    names = step.files[step.routes[chunk.lane][chunk.stage]]["names"]
    return {names[number]: parts for number, parts in step.parts(chunk).items()}
