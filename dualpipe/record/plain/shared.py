"""Weights that several stages share: on one rank, or as tied weights of two stages, each with a copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.plain import links
from dualpipe.record.plain.gradients import Agreement, equal, sum_of
from dualpipe.record.plain.sums import Partner
from dualpipe.schedule import Chunk

if TYPE_CHECKING:
    from dualpipe.record.plain.step import Step


def users(step: Step, rank: int) -> dict[int, set[Chunk]]:
    """By parameter of a rank the stages that use it."""
    users: dict[int, set[Chunk]] = {}
    for task, found in step.forwards.items():
        if step.routes[task.lane][task.stage] == rank:
            for number in found.get("weights", {}):
                users.setdefault(number, set()).add(task.chunk)
    return users


def over_stages(step: Step, rank: int, number: int) -> Agreement | str:
    """How the gradient of a parameter that several stages of a rank use agrees with the sum over them.

    In which order they add to it is not fixed.  It may be summed over the ranks that hold the same parameter, too.
    """
    final, name = step.files[rank]["final"][number], step.files[rank]["names"][number]
    own = _sum_over(step, rank, number)
    every = [own]
    for other in {rank for route in step.routes.values() for rank in route} - {rank}:
        of_several = [n for n, chunks in users(step, other).items() if len(chunks) > 1]
        every += [_sum_over(step, other, n) for n in of_several if step.files[other]["names"][n] == name]
    if own is None or final is None:
        zero = (own is None or not bool(own.any())) and (final is None or not bool(final.any()))
        return Agreement("") if zero else "only one of the gradient and the sum over the stages that use it exists"
    sums = [own, *([total for total in [sum_of(every)] if total is not None and total.shape == own.shape])]
    ways = [(by, 1.0) for by in (1, *step.counts())] + [(1, scale) for scale in step.scales]
    for by, scale in ways:
        if any(links.near(final.double() * by / scale, total) for total in sums):
            how = f" and divided by {by}" * (by > 1) + f" and scaled by {scale:.4g}" * (scale != 1)
            shown = f"{name} is summed over the stages that use it{how}, up to rounding"
            return Agreement(shown, scale=scale, divided_by=by)
    return "the gradient is not the sum over the stages of the rank that use the parameter"


def _sum_over(step: Step, rank: int, number: int) -> Tensor | None:
    """The total gradient of a parameter over all stages of a rank, in double precision."""
    totals = [step.parts(chunk)[number].total(None) for chunk in users(step, rank).get(number, ())]
    return sum_of([None if total is None else total.double() for total in totals])


def summed_with(step: Step, chunk: Chunk, number: int, final: Tensor | None) -> Agreement | str:
    """The parameter of another stage with which a gradient was summed: a tied weight, or by mistake another one."""
    own = step.parts(chunk)[number].total(final)

    def is_sum(total: Tensor | None) -> bool:
        return own is not None and total is not None and total.shape == own.shape and equal(final, own + total)

    for each in partners(step, chunk, number):
        if is_sum(each.every[0].total(final)):
            return Agreement(each.words, copies=frozenset([number] * (each.stage < chunk.stage)))
    own_value = step.file(chunk).get("weights", {}).get(number)
    others = [Chunk(lane, stage) for lane, route in step.routes.items() for stage in range(len(route))]
    for other in (each for each in others if each != chunk and step.has(each)):
        values = step.file(other).get("weights", {})
        for at, parts in step.parts(other).items():
            if is_sum(parts.total(final)) and not equal(own_value, values.get(at)):
                return (
                    f"the gradient is summed with that of {step.name(other, at)} of stage {other.stage}, which is "
                    "another weight: does the reduction have ranks of different stages?"
                )
    return ""


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


def perhaps_tied(step: Step, chunks: Sequence[ChunkComparison]) -> Iterator[tuple[Chunk, str]]:
    """The weights of two stages that are the same before the step and not after it, with a question for the first."""
    every = [each.chunk for each in chunks if step.has(each.chunk)]
    for at, chunk in enumerate(every):
        for other in every[at + 1 :]:
            if chunk.lane is not other.lane or chunk.stage == other.stage or step.file(chunk) is step.file(other):
                continue
            before = [_varied(step.named(each, "weights")) for each in (chunk, other)]
            after = [step.named(each, "changed") for each in (chunk, other)]
            pairs = [(one, two) for one in before[0] for two in before[1] if equal(before[0][one], before[1][two])]
            if max(map(len, before)) <= len(pairs):
                continue  # the stages have been initialized alike as a whole
            for one, two in pairs:
                if all(after) and not equal(after[0].get(one), after[1].get(two)):
                    yield (
                        chunk,
                        f"{one} has the values of {two} of stage {other.stage} before the step and not after it: if "
                        "they are tied, is the gradient summed over both stages?",
                    )


def _varied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with different elements: two norms that are initialized to ones say nothing."""
    return {
        name: each for name, each in weights.items() if each.numel() > 1 and bool((each != each.flatten()[0]).any())
    }
