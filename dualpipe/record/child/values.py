"""The values that a program reads from its tensors, and the single values that its ranks reduce."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import _disable_current_modes

from .flow import Flow
from .patches import Patches


class Values:
    """What one rank reads; ``read`` grows until the program ends, the others until ``step_ends``.

    ``read`` are the forwards of whose results the program read a value, ``losses`` these values by forward.
    ``scalars`` are the values that it read or reduced since it last computed anything, as those of a norm are.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._in_step = True
        self._looking = False  # whether the recorder itself is reading
        self.read: set[int] = set()
        self.losses: dict[int, set[float]] = {}
        self.scalars: list[float] = []

    def watch(self, patches: Patches) -> None:
        """Watch the reads and reductions until ``patches.undo()``."""
        for name in ("item", "tolist", "__float__"):
            patches.put(torch.Tensor, name, self._reading(getattr(torch.Tensor, name)))
        patches.wrap(c10d.all_reduce, self._reducing)

    def step_ends(self) -> None:
        self._in_step = False

    def of(self, tensor: Tensor) -> float:
        """The value of a scalar, without counting it as read by the program."""
        self._looking = True
        try:
            with _disable_current_modes():
                return float(tensor.detach())
        finally:
            self._looking = False

    def note_loss(self, forwards: Iterable[int], value: float) -> None:
        """The program holds or reads this value of these forwards' results."""
        for forward in forwards:
            self.losses.setdefault(forward, set()).add(value)

    def _reading(self, original: Any) -> Any:
        @functools.wraps(original)
        def read(tensor: Tensor, *args: Any) -> Any:
            if self._looking:
                return original(tensor, *args)
            found = self._flow.origins.forwards_of(tensor)
            self.read |= found
            value = original(tensor, *args)
            if self._in_step and isinstance(value, float):
                self.scalars.append(value)
                if found:
                    self.note_loss(found, value)
            return value

        return read

    def _reducing(self, original: Any) -> Any:
        @functools.wraps(original)
        def reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            work = original(tensor, *args, **kwargs)
            if self._in_step and work is None and tensor.numel() == 1 and tensor.is_floating_point():
                self.scalars.append(self.of(tensor))
            return work

        return reduce
