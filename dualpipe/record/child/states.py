"""Random states that modules switch between with ``torch.set_rng_state``, as for a dropout with a state of its own.

A plain run comes after the step, when such a module holds later states.  So the states that a call sets are kept, and
set again in their order when the call is repeated.  States that a module sets on the generator itself, as Megatron's
tracker does, are not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .patches import Patches


class States:
    """The states of the random generator that the program sets during a call."""

    def __init__(self) -> None:
        self._kept: list[Tensor] | None = None
        self._given: Iterator[Tensor] | None = None

    def watch(self, patches: Patches) -> None:
        """Watch ``torch.set_rng_state`` until ``patches.undo()``."""
        patches.wrap(torch.random.set_rng_state, self._setting)

    def _setting(self, original: Any) -> Any:
        @functools.wraps(original)
        def set_rng_state(new_state: Tensor) -> None:
            if self._kept is not None:
                self._kept.append(new_state.clone())
            if self._given is not None:
                new_state = next(self._given, new_state)
            original(new_state)

        return set_rng_state

    @contextmanager
    def kept(self, states: list[Tensor]) -> Iterator[None]:
        """Add the states that are set in a block to a list."""
        before, self._kept = self._kept, states
        try:
            yield
        finally:
            self._kept = before

    @contextmanager
    def given(self, states: Sequence[Tensor]) -> Iterator[None]:
        """Set these states in a block, one after the other, in place of those that are set."""
        self._given = iter(states)
        try:
            yield
        finally:
            self._given = None
