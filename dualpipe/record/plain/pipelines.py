"""The replicas of a stage in the other pipelines of a job: whether gradients are summed over them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from dualpipe.record.phrases import names_of
from dualpipe.record.plain.gradients import Agreement, equal
from dualpipe.record.plain.links import ROUNDING
from dualpipe.record.plain.shared import partners
from dualpipe.record.plain.sums import Replica, Summed, agreement_of_all, factor_of_shards
from dualpipe.schedule import Chunk

if TYPE_CHECKING:
    from dualpipe.record.plain.step import Step


def of_all(step: Step, chunk: Chunk) -> Agreement | None:
    """How all gradients of a chunk agree with one factor times sums, over all pipelines of the job if any."""
    if any(not each.has(chunk) for each in step.replicas):
        return None
    file, names = step.file(chunk), step.names(chunk)
    of_others = [each.parts_by_name(chunk) for each in step.replicas]
    parameters: list[Summed] = []
    for number, parts in step.parts(chunk).items():
        matching = [named.get(names[number]) for named in of_others]
        final = file["final"][number]
        if final is None or parts.slopes or parts.earlier() or not all(matching):
            return None
        every = [parts, *filter(None, matching)]
        parameters.append(Summed(number, final, every, partial(partners, step, chunk, number)))
    counts = (1, *sorted({1 + len(of_others), *step.counts()}))
    return agreement_of_all(parameters, chunk.stage, len(step.routes) > 1, counts) if parameters else None


def in_shards(step: Step, chunk: Chunk) -> Agreement | None:
    """How the gradients agree if each replica of the stage, on a lane or in a pipeline, sums a shard of them."""
    every = [(one, Chunk(lane, chunk.stage)) for one in (step, *step.replicas) for lane in one.routes]
    if any(not one.has(each) for one, each in every):
        return None
    replicas: list[Replica] = []
    for one, each in every:
        names, final = one.names(each), one.file(each)["final"]
        own = {number: parts.total(final[number]) for number, parts in one.parts(each).items()}
        replicas.append({names[n]: (final[n], t) for n, t in own.items() if t is not None and final[n] is not None})
    if any(len(each) < len(step.names(chunk)) for each in replicas):
        return None
    found = ((by, factor_of_shards(replicas, by)) for by in (1, len(replicas), *step.counts()))
    by, factor = next(((by, factor) for by, factor in found if factor is not None), (1, None))
    if factor is None:
        return None
    clipped = abs(factor - 1) > ROUNDING
    how = [f"summed in shards, one on each of {len(replicas)} replicas"]
    how += [f"scaled by {factor / by:.4g}"] if clipped else [f"divided by {by}"] if by > 1 else []
    sums = [torch.stack([each[name][1].double() for each in replicas]).sum(0) for name in replicas[0]]
    return Agreement(
        f"{' and '.join(how)}, up to rounding",
        True if len(step.routes) > 1 else None,
        factor / by if clipped else 1.0,
        factor=factor / by,
        pipelines=1 + len(step.replicas),
        squares=sum(float(each.square().sum()) for each in sums) * (factor / by) ** 2,
    )


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
