"""Changes that programs make to whole gradients before an optimizer's step: clipping by value, weight decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_NEAR = 1e-4
"""How far rounding may be off, relative to the largest element."""
_LEAST = 2
"""So many elements must show a change, since any number would explain a single one."""


def limit_of(final: Tensor, total: Tensor) -> float | None:
    """The limit to which the values of ``total`` are clipped in ``final``, if that shows."""
    if final.shape != total.shape or not final.numel():
        return None
    limit = final.abs().max()
    clipped, zero = total.abs() > limit, final == 0
    varied = len(set(total[clipped].abs().tolist())) >= _LEAST  # a factor does not make different values equal
    shows = int(clipped.sum()) >= _LEAST and (varied or int((~clipped & ~zero).sum()) >= _LEAST)
    return float(limit) if shows and torch.equal(final, total.clamp(-limit, limit)) else None


def describe(final: Tensor, total: Tensor, weight: Tensor | None, limits: Sequence[float]) -> str:
    """The change that makes the gradient ``final`` from ``total``, or an empty text.

    The three have one shape.  A gradient is clipped by value if all values beyond one of the ``limits`` are this limit,
    and all others are bitwise those of ``total``; it has a weight decay if it differs from ``total`` by a multiple of
    the ``weight``.
    """
    for limit in limits:
        if torch.equal(final, total.clamp(-limit, limit)):
            return f"clipped to values up to {limit:.4g}"
    if weight is None or int((weight != 0).sum()) < 2 * _LEAST:
        return ""
    change, whole = final.double() - total.double(), weight.double()
    decay = float((change * whole).sum() / (whole * whole).sum())
    error = float((change - decay * whole).abs().max())
    if decay > 0 and error <= _NEAR * decay * float(whole.abs().max()):
        return f"with a weight decay of {decay:.4g}, up to rounding"
    return ""
