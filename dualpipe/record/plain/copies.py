"""Weights of two stages that are the same before a step: whether they are still the same after it.

They may be a tied weight, or just have been initialized alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from dualpipe.record.comparison import ChunkComparison
from dualpipe.record.plain.gradients import equal
from dualpipe.record.plain.step import Step
from dualpipe.schedule import Chunk


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
