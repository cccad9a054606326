"""Gradients that are the sum over a stretch of microbatches, such as all that follow the middle of a step.

The factors of the microbatches in a gradient of few elements cannot be solved for, as there are more of them than
elements.  But only a few sums are likely: those over consecutive microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST = 4
"""Fewer elements than this may fit a wrong sum by chance."""
_NEAR = 1e-4


def stretch_of(final: Tensor, own: Sequence[Tensor], far: Sequence[Tensor]) -> tuple[list[float], list[float]] | None:
    """The factors of the microbatches of the own lane and of the other one, if ``final`` is a multiple of such a sum.

    The microbatches of a stretch have the same factor and the others 0.  Those of the other lane are in the sum all, or
    none, or in the same stretch.  The longest sum is chosen; ``None`` if none fits.
    """
    if not own or final.numel() < _LEAST:
        return None
    wanted = final.double().reshape(-1)
    sums, far_sums = (_sums(each, wanted.numel()) for each in (own, far))
    found: tuple[int, list[float], list[float]] | None = None
    for start in range(len(own)):
        stretches = sums[start + 1 :] - sums[start]
        ends = range(start + 1, len(own) + 1)
        everywhere: list[tuple[Tensor, list[range]]] = [(stretches, [range(0)] * len(ends))]
        if far:
            everywhere.append((stretches + far_sums[-1], [range(len(far))] * len(ends)))
        if len(far) == len(own):
            everywhere.append(
                (stretches + far_sums[start + 1 :] - far_sums[start], [range(start, end) for end in ends])
            )
        for totals, of_far in everywhere:
            scales = totals @ wanted / totals.square().sum(1)
            off = (totals * scales[:, None] - wanted).abs().amax(1)
            for at in ((scales > 0) & (off <= _NEAR * wanted.abs().max())).nonzero().flatten().tolist():
                count = at + 1 + len(of_far[at])
                if found is None or count > found[0]:
                    scale = float(scales[at])
                    here = [scale * (start <= mb < ends[at]) for mb in range(len(own))]
                    found = count, here, [scale * (mb in of_far[at]) for mb in range(len(far))]
    return None if found is None else found[1:]


def _sums(gradients: Sequence[Tensor], size: int) -> Tensor:
    """The sums of the first gradients: of none, of one, and so on."""
    rows = [gradient.double().reshape(-1) for gradient in gradients]
    return torch.stack([torch.zeros(size, dtype=torch.float64), *rows]).cumsum(0)
