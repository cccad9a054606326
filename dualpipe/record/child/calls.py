"""Calls of modules while they run."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .marks import Marks


@dataclass
class Call:
    """An outermost call of a module.

    ``made`` are the marks of its results.  A call without tensors is not a forward yet, and ``made`` is ``None``, until
    the module reads a tensor that was received or detached for it, or a parameter of its own.
    """

    module: nn.Module
    made: Marks | None = None
    left: Marks | None = None
    is_open: bool = False  # whether the operators that now run belong to it
    communicates: bool = False

    def holds(self, tensor: Tensor) -> bool:
        return any(tensor is parameter for parameter in self.module._parameters.values())
