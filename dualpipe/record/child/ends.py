"""Runs autograd from the outputs of a plain run, with the gradients that the recorded backward had for them.

An output may be computed from another one, as in ``return self.head(hidden), hidden``.  Then the gradient of ``hidden``
includes what comes through the head, which autograd brings a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 1e-6
"""How far a difference of gradients may be off, relative to the largest element of one of them."""

Root = tuple[Tensor, Tensor]
"""An output, and its gradient in the recorded backward."""


def run_backward(roots: Sequence[Root]) -> dict[int, Tensor | None]:
    """Run autograd so that every output has the gradient of the recorded backward.

    Returns, for the outputs from which others are computed, by ``id`` of the gradient in ``roots``: the part of it that
    does not come through the others; ``None`` if there is no such part.
    """
    inner = _inner([leaf for leaf, _ in roots])
    ends = [(leaf, gradient) for leaf, gradient in roots if id(leaf) not in inner]
    within = [(leaf, gradient) for leaf, gradient in roots if id(leaf) in inner]
    through: dict[int, Tensor] = {}

    def replace(at: int, whole: Tensor, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        through[at] = gradient.detach().clone()
        return whole.to(gradient.dtype)

    for at, (leaf, whole) in enumerate(within):
        leaf.register_hook(lambda gradient, at=at, whole=whole: replace(at, whole, gradient))  # type: ignore[no-untyped-call]
    if ends:
        torch.autograd.backward([leaf for leaf, _ in ends], [gradient for _, gradient in ends], bool(within))
    outside: dict[int, Tensor | None] = {}
    for at, (leaf, whole) in enumerate(within):
        if at not in through:  # the others give it no gradient
            torch.autograd.backward([leaf], [whole], True)
            outside[id(whole)] = whole
            continue
        rest = whole - through[at]
        most = float(whole.double().abs().max()) if whole.numel() else 0.0
        there = rest.numel() and float(rest.double().abs().max()) > _ROUNDING * most
        outside[id(whole)] = rest if there else None
    return outside


def _inner(outputs: Sequence[Tensor]) -> set[int]:
    """The ids of the outputs from which others are computed."""
    nodes: dict[Any, set[int]] = {}
    for output in outputs:
        if output.grad_fn is not None:
            nodes.setdefault(output.grad_fn, set()).add(id(output))
    found: set[int] = set()
    seen: set[Any] = set()
    below = [following for node in nodes for following, _ in node.next_functions]
    while below:
        node = below.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found |= nodes.get(node, set())
        below.extend(following for following, _ in node.next_functions)
    return found
