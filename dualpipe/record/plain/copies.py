"""Copies of a weight on several ranks: whether weights that are the same before a step are still the same after it.

They are the same weight if data-parallel pipelines train one model.  In two stages of one pipeline they may be a tied
weight, or just have been initialized alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.plain.gradients import equal
from dualpipe.record.plain.replicas import shown
from dualpipe.record.plain.step import Step
from dualpipe.schedule import Chunk


def updated_apart(step: Step, chunks: Sequence[ChunkComparison], ranks: Sequence[Sequence[int]]) -> Iterator[str]:
    """What is wrong with the copies of each stage in other pipelines of the job, one sentence each.

    ``ranks`` are the ranks of the job that the pipeline has, and then those of each of ``step.replicas``.
    """
    for chunk in (each.chunk for each in chunks):
        for other, others in zip(step.replicas, ranks[1:], strict=False):
            if not (step.ran(chunk) and other.ran(chunk)):
                continue
            before, after = ([each.weights(chunk, of) for each in (step, other)] for of in ("weights", "changed"))
            alike = before[0].keys() == before[1].keys() and all(equal(before[0][n], before[1][n]) for n in before[0])
            apart = [name for name in before[0] if not equal(after[0].get(name), after[1].get(name))]
            if alike and apart and all(after):
                at = f"{ranks[0][step.rank(chunk)]} and {others[other.rank(chunk)]}"
                yield (
                    f"{chunk} has the same weights on ranks {at} of the job before the step and different ones after "
                    f"it: {shown(apart)}. Are the gradients summed over the pipelines, after the last backward?"
                )
                break


def perhaps_tied(step: Step, chunks: Sequence[ChunkComparison]) -> Iterator[tuple[Chunk, str]]:
    """The weights of two stages that are the same before the step and not after it, with a question for the first."""
    every = [each.chunk for each in chunks if step.ran(each.chunk)]
    for at, chunk in enumerate(every):
        for other in every[at + 1 :]:
            if chunk.lane is not other.lane or chunk.stage == other.stage or step.rank(chunk) == step.rank(other):
                continue
            before = [_varied(step.weights(each, "weights")) for each in (chunk, other)]
            after = [step.weights(each, "changed") for each in (chunk, other)]
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
