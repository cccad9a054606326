"""The replicas of a stage in the other pipelines of a job: whether gradients are summed over them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from dualpipe.record.phrases import names_of
from dualpipe.record.plain.gradients import Agreement, equal
from dualpipe.record.plain.sums import Partner, Summed, agreement_of_all
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
        if final is None or parts.slopes or parts.before is not None or not all(matching):
            return None
        every = [parts, *filter(None, matching)]
        parameters.append(Summed(number, final, every, partial(partners, step, chunk, number)))
    counts = (1, *sorted({1 + len(of_others), *step.counts()}))
    return agreement_of_all(parameters, chunk.stage, len(step.routes) > 1, counts) if parameters else None


def partners(step: Step, chunk: Chunk, number: int) -> Iterator[Partner]:
    """The parameters of other stages, to which one may be tied as the embedding is to the output layer.

    Tied weights are equal before the step.  So a gradient that is summed over stages by mistake is no such sum.
    """
    value = step.file(chunk).get("weights", {}).get(number)
    if value is None or not value.numel() or bool((value == value.reshape(-1)[0]).all()):
        return
    for stage in range(len(step.routes[chunk.lane])):
        other = Chunk(chunk.lane, stage)
        if stage == chunk.stage or any(not each.has(other) for each in (step, *step.replicas)):
            continue
        names, values = step.names(other), step.file(other).get("weights", {})
        of_others = [each.parts_by_name(other) for each in step.replicas]
        for at, parts in step.parts(other).items():
            if not equal(value, values.get(at)):
                continue
            matching = [named[names[at]] for named in of_others if names[at] in named]
            words = f"{step.name(chunk, number)} is summed with {names[at]} of stage {stage}, to which it is tied"
            yield Partner(words, stage, [parts, *matching])


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
