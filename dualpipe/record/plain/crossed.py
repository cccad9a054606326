"""Gradients that a stage uses for another output than the one that it has sent, or does not use at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from dualpipe.record.plain.gradients import equal
from dualpipe.record.plain.links import Plainly


def crossed(found: Plainly, after: Plainly | None) -> bool:
    """Whether the gradient of something that the next stage takes is bitwise that of another output only.

    ``found`` and ``after`` are what the ranks of the two stages have for one microbatch.
    """
    for sent, gradient in _sent(found, after):
        used = _equal_to(gradient, found["output gradients"])
        if used and sent.isdisjoint(used):
            return True
    return False


def left_out(found: Plainly, after: Plainly | None) -> bool:
    """Whether the next stage has a gradient for an output that needs one, and the backward ran without any for it."""

    def lacks(at: int) -> bool:
        return found["need gradients"][at] and found["output gradients"][at] is None

    return any(all(map(lacks, sent)) for sent, _ in _sent(found, after))


def _sent(found: Plainly, after: Plainly | None) -> Iterator[tuple[set[int], Tensor]]:
    """For what the next stage takes and has a gradient for: which outputs it is, and the gradient."""
    if after is None or "error" in after or "output gradients" not in found:
        return
    taken, gradients = after["took"], after["input gradients"]
    for tensor, gradient in zip(taken, gradients, strict=True) if len(taken) == len(gradients) else ():
        if gradient is not None and bool(gradient.any()) and (sent := _equal_to(tensor, found["plainly"])):
            yield sent, gradient


def _equal_to(tensor: Tensor, others: Sequence[Tensor | None]) -> set[int]:
    return {at for at, other in enumerate(others) if other is not None and equal(tensor.reshape(-1), other.reshape(-1))}
