"""Random numbers that modules draw, so that a plain run draws the same ones.

A plain run comes after the step, when random generators have other states.  A module may also have generators of its
own, or switch between states, as Megatron's tracker does for tensor-parallel dropout.  So the state of the generator is
kept before each operator that draws from it, in the order of the draws, and set again before the same operator of the
plain run.  A forward that is computed again in the backward, as for activation checkpointing, draws once more; these
states are kept apart, and must be among those of the forward.  Python's and NumPy's generators, which no operator
shows, are kept at the beginning of a call.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .log import program_line


@dataclass(frozen=True)
class Generators:
    """The states of the process's generators: torch's for the CPU, Python's, and NumPy's if the program uses it."""

    torch_state: Tensor
    python_state: Any
    numpy_state: Any

    @classmethod
    def now(cls) -> Generators:
        numpy = sys.modules.get("numpy")
        return cls(torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state())

    def restore(self) -> None:
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        if self.numpy_state is not None:
            sys.modules["numpy"].random.set_state(self.numpy_state)


class Draw(NamedTuple):
    """A state from which an operator drew; ``at`` is its line if it belongs to a forward that is computed again."""

    state: Tensor
    at: str = ""


@dataclass
class Drawn:
    """What a module call drew: in its forward, and in each run of the engine by its number."""

    forward: list[Draw] = field(default_factory=list)
    runs: dict[int, list[Draw]] = field(default_factory=dict)

    def again(self) -> list[Draw]:
        """What one backward draws: that of the first run which drew at all."""
        return next((drawn for _, drawn in sorted(self.runs.items()) if drawn), [])

    def other(self) -> str:
        """Where a forward that is computed again draws other numbers than before; empty if it does not."""
        known = {draw.state.numpy().tobytes() for draw in self.forward}
        again = (draw for drawn in self.runs.values() for draw in drawn if draw.at)
        return next((draw.at for draw in again if draw.state.numpy().tobytes() not in known), "")


class Draws(TorchDispatchMode):
    """Keeps the states from which operators draw, or sets them; entered for calls and for runs of the engine."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self._kept: list[Draw] | None = None
        self._given: Iterator[Draw] | None = None
        self._again: dict[int, Iterator[Draw]] = {}  # by id of what a call drew
        self._run = 0  # the number of the last run of the engine
        self._running = self._entered = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            generator = kwargs.get("generator") or torch.default_generator
            if self._kept is not None:
                again = self._running and torch.is_grad_enabled()  # a backward itself runs without gradients
                self._kept.append(Draw(generator.get_state(), program_line() if again else ""))
            elif self._given is not None and (draw := next(self._given, None)) is not None:
                generator.set_state(draw.state)
        return func(*args, **kwargs)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """See every operator of a block, once; afterwards go on as before."""
        before, self._entered = (self._kept, self._given, self._running, self._entered), True
        try:
            with nullcontext() if before[-1] else self:
                yield
        finally:
            self._kept, self._given, self._running, self._entered = before

    @contextmanager
    def kept(self, states: list[Draw]) -> Iterator[None]:
        """Add the states from which a block draws to a list."""
        with self._watching():
            self._kept = states
            yield

    @contextmanager
    def given(self, states: Sequence[Draw]) -> Iterator[None]:
        """Let a block draw from these states, one after the other."""
        with self._watching():
            self._given = iter(states)
            yield

    @contextmanager
    def engine_run(self) -> Iterator[None]:
        """A run of the engine: what it draws belongs to the call whose output it has reached last."""
        with self._watching():
            if not self._running:
                self._run += 1
            self._running = True
            yield

    def reached(self, drawn: Drawn) -> None:
        """The engine has reached an output of a call, in the recorded run."""
        if self._running:
            self._kept = drawn.runs.setdefault(self._run, [])

    def reached_again(self, drawn: Drawn) -> None:
        """The engine has reached an output of a call, in the plain run."""
        if self._running:
            self._given = self._again.setdefault(id(drawn), iter(drawn.again()))

    def forget(self) -> None:
        """The plain run of another forward begins."""
        self._again.clear()
