"""Gradients that a stage uses for another output than the one that it has sent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dualpipe.record.plain.gradients import equal
from dualpipe.record.plain.links import Plainly


def crossed(found: Plainly, after: Plainly | None) -> bool:
    """Whether the gradient of something that the next stage takes is bitwise that of another output only.

    ``found`` and ``after`` are what the ranks of the two stages have for one microbatch.
    """
    if after is None or "error" in after or "output gradients" not in found:
        return False
    taken, gradients = after["took"], after["input gradients"]
    if len(taken) != len(gradients):
        return False
    for tensor, gradient in zip(taken, gradients, strict=True):
        if gradient is None or not bool(gradient.any()):
            continue
        sent = _equal_to(tensor, found["plainly"])
        used = _equal_to(gradient, found["output gradients"])
        if sent and used and sent.isdisjoint(used):
            return True
    return False


def _equal_to(tensor: Tensor, others: Sequence[Tensor | None]) -> set[int]:
    return {at for at, other in enumerate(others) if other is not None and equal(tensor.reshape(-1), other.reshape(-1))}
