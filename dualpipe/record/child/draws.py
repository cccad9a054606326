"""Random numbers that modules draw, so that a plain run draws the same ones.

A plain run comes after the step, when random generators have other states.  A module may also have generators of its
own, or switch between states, as Megatron's tracker does for tensor-parallel dropout.  So the state of the generator is
kept before each operator that draws from it, in the order of the draws, and set again before the same operator of the
plain run.  A forward that is computed again in the backward, as for activation checkpointing, draws once more; these
states are kept apart, and must be among those of the forward.  Python's and NumPy's generators, which no operator
shows, are kept at the beginning of a call.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class Draws:
    """Keeps the states from which a program draws, and sets them in a plain run."""

    def __init__(self) -> None:
        self._kept: list[Draw] | None = None
        self._given: Iterator[Draw] | None = None
        self._elsewhere: set[bytes] = set()  # states from which the program drew outside of calls
        self._again: dict[int, Iterator[Draw]] = {}  # by id of what a call drew
        self._run = 0  # the number of the last run of the engine
        self._running = False

    def operator(self, func: Any, kwargs: Mapping[str, Any]) -> None:
        """An operator is about to run."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return
        generator = kwargs.get("generator") or torch.default_generator
        if self._given is not None:
            if (draw := next(self._given, None)) is not None:
                generator.set_state(draw.state)
        elif self._kept is not None:
            again = self._running and torch.is_grad_enabled()  # a backward itself runs without gradients
            self._kept.append(Draw(generator.get_state(), program_line() if again else ""))
        elif not self._running:
            self._elsewhere.add(_key(generator.get_state()))

    @contextmanager
    def kept(self, drawn: list[Draw]) -> Iterator[None]:
        """Keep what a block draws in a list."""
        before, self._kept = self._kept, drawn
        try:
            yield
        finally:
            self._kept = before

    @contextmanager
    def engine_run(self) -> Iterator[None]:
        """A run of the engine: what it draws belongs to the call whose output it has reached last."""
        before = self._kept, self._running
        self._run += not self._running
        self._running = True
        try:
            yield
        finally:
            self._kept, self._running = before

    def reached(self, drawn: Drawn) -> None:
        """The engine has reached an output of a call."""
        if self._running:
            self._kept = drawn.runs.setdefault(self._run, [])

    def other(self, calls: Sequence[Drawn]) -> str:
        """Where one of the calls, computed again in the backward, draws other numbers than before; empty if none does.

        The calls are those of one forward, which may compute outside of modules between them.
        """
        known = self._elsewhere.union(_key(draw.state) for call in calls for draw in call.forward)
        again = (draw for call in calls for drawn in call.runs.values() for draw in drawn if draw.at)
        return next((draw.at for draw in again if _key(draw.state) not in known), "")

    def forget(self) -> None:
        """Forget what was drawn outside of calls: another step begins."""
        self._elsewhere.clear()

    # the plain run

    @contextmanager
    def plain_run(self) -> Iterator[None]:
        """The plain run of one forward, in which no other mode watches the operators."""
        self._again.clear()
        try:
            with _Operators(self):
                yield
        finally:
            self._given = None

    @contextmanager
    def given(self, drawn: Sequence[Draw]) -> Iterator[None]:
        """Let a block of a plain run draw the same again, in this order."""
        before, self._given = self._given, iter(drawn)
        try:
            yield
        finally:
            self._given = before

    def reached_again(self, drawn: Drawn) -> None:
        """The engine has reached an output of a call in a plain run."""
        self._given = self._again.setdefault(id(drawn), iter(drawn.again()))


class _Operators(TorchDispatchMode):
    def __init__(self, draws: Draws) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's own
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._draws.operator(func, kwargs)
        return func(*args, **kwargs)


def _key(state: Tensor) -> bytes:
    return hashlib.blake2b(state.numpy().tobytes(), digest_size=16).digest()
