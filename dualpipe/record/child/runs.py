"""Runs of the autograd engine: which backward each is, when that begins, and what it does to weight gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import graph
from .forwards import Forwards
from .marks import Table
from .owed import Owed
from .parameters import Parameters

_COMMUTE = 2  # the sum of so many gradients does not depend on their order


@dataclass
class Run:
    """A run of the engine.

    ``forwards`` are those whose backward it is, ``unreached`` those of them whose backward has not begun.  A run that
    is ``for_weights`` alone begins no backward; ``requested`` says whether it returns gradients of weights, and
    ``targets`` are the ids of those.  One that ``spares`` the weights was requested for other gradients alone.
    """

    number: int
    forwards: set[int]
    unreached: set[int]
    for_weights: bool
    requested: bool
    targets: frozenset[int] = frozenset()
    spares: bool = False
    received: set[int] = field(default_factory=set)
    began: int = 0  # how many backwards have begun since the last message


class Runs:
    """The runs of one rank, of which at most one is in progress.

    A backward begins when the engine reaches the node of an output of its forward.  Before that, the same run may
    receive the gradient: in a function of the program that communicates in its backward.
    """

    def __init__(
        self, write: Callable[..., None], table: Table, forwards: Forwards, parameters: Parameters, owed: Owed
    ) -> None:
        self._write = write
        self._table = table
        self._forwards = forwards
        self._parameters = parameters
        self._owed = owed
        self.count = 0  # how many have begun
        self._current: Run | None = None
        self.sent: set[int] = set()  # forwards of which a gradient has been sent
        self.gradient_of: dict[int, int] = {}  # message -> the forward whose backward takes its tensor

    def begin(
        self,
        roots: Sequence[Any],
        grads: Sequence[Any],
        inputs: Sequence[Any],
        owners: Callable[[set[int] | None], set[int]],
    ) -> set[int]:
        """The engine is about to run from ``roots``; returns the forwards that they are made from, or else ``owners``.

        A run from no output of a forward, but from or to a parameter, is one of the weight gradients of the owners.
        """
        self.count += 1
        made_by = [self.makers(root) for root in roots]
        found = {forward for made in made_by for forward in made}
        for made, gradient in zip(made_by, grads, strict=False):
            # a root that no forward made may be an input that the only one has returned as it is
            self._take([gradient], made or (found if len(found) == 1 else set()))
        targets = [self._variable(target) for target in inputs]
        weights = [target in self._parameters for target in targets]
        for_weights = bool(weights) and all(weights)
        fresh = set() if for_weights else found - self._forwards.backward_began
        if found and not for_weights and graph.has_run(roots):
            self._write("doubt", what="run again", forward=min(found))
        elif not for_weights and (late := {f for f in map(self._forwards.find, self.sent) if f in found - fresh}):
            self._write("doubt", what="sent before", forward=min(late))
        requested = any(weights) and bool(found)
        if not found:
            ends = [end for end in (*map(self._variable, roots), *targets) if end in self._parameters]
            holders = {holder for end in ends for holder in self._parameters.holders(id(end))}
            found = (owners(holders) if holders else set()) or owners(None)
        ids = frozenset(id(target) for target, is_weight in zip(targets, weights, strict=True) if is_weight)
        self._current = Run(
            self.count, set(found), fresh, for_weights, requested, ids, bool(weights) and not any(weights)
        )
        self._parameters.listen()
        self._owed.begin(grads)
        return found

    def reach(self, forward: int, gradients: Iterable[Any]) -> set[int]:
        """The engine has reached an output of a forward; returns that forward if the run is that of several."""
        run = self._current
        if run is None:
            return set()
        forward = self._forwards.find(forward)
        self._take(gradients, {forward})
        run.forwards.add(forward)
        if not run.for_weights and (forward in run.unreached or forward not in self._forwards.backward_began):
            self._begin_backward(run, [forward])
        return {forward} if len(run.forwards) > 1 else set()

    def spares_weights(self) -> bool:
        """Whether the run in progress was requested for no gradient of a weight."""
        return self._current is not None and self._current.spares

    def runs_for(self, forward: int) -> bool:
        """Whether the run in progress is one of this forward."""
        return self._current is not None and forward in map(self._forwards.find, self._current.forwards)

    def post(self, messages: Iterable[int]) -> None:
        """Messages have been posted, perhaps within the run."""
        if self._current is not None:
            self._current.received.update(messages)
            self._current.began = 0

    def in_transit(self) -> set[int]:
        """The messages that the run has received and no backward has taken yet."""
        return set() if self._current is None else self._current.received - self.gradient_of.keys()

    def end(self, completed: bool) -> None:
        """The engine has returned, or raised."""
        run, self._current = self._current, None
        self._owed.end()
        if run is None or not completed:
            return
        if run.unreached:
            self._begin_backward(run, sorted(run.unreached))
        if run.requested:
            self._write("weights requested", forwards=sorted(run.forwards), run=run.number)
        added = self._parameters.added()
        holders = [self._parameters.holders(parameter) for parameter in added]
        changed = {f for f in run.forwards if any(self._forwards.calls_one_of(f, held) for held in holders)}
        if changed:
            self._write("weights", forwards=sorted(changed), run=run.number)
        self._owed.pay(run.forwards, added | run.targets)
        self._owed.settle(run.forwards, added | run.targets)

    def _begin_backward(self, run: Run, forwards: list[int]) -> None:
        run.unreached -= set(forwards)
        run.began += len(forwards)
        if run.began > _COMMUTE >= run.began - len(forwards):
            self._write("doubt", what="summed", forward=forwards[0])
        self._forwards.backward_began.update(forwards)
        modules = {forward: self._forwards.modules(forward) for forward in forwards}
        sharded = [forward for forward in forwards if self._parameters.sharded(modules[forward])]
        for forward in sharded:
            self._write("doubt", what="sharded", forward=forward)
        untrainable = [forward for forward in forwards if not self._parameters.trainable(modules[forward])]
        self._write("backward", forwards=forwards, run=run.number, untrainable=untrainable, sharded=sharded)

    def _take(self, gradients: Iterable[Any], forwards: set[int]) -> None:
        """Assign to forwards the messages with the gradient of one of their outputs that had no taker yet."""
        received = {n for g in gradients if isinstance(g, Tensor) for letter, n in self._table.get(g) if letter == "M"}
        fresh = sorted(received - self.gradient_of.keys())
        if fresh and forwards:
            self.gradient_of |= dict.fromkeys(fresh, min(forwards))
            self._write("gradients", forwards=sorted(forwards), messages=[fresh] * len(forwards))

    def makers(self, root: Tensor | GradientEdge) -> set[int]:
        """The forwards that made a tensor: by its graph, because the memory of a sent tensor may have been freed."""
        found = {self._forwards.find(number) for number in graph.marks_below(root)}
        if found or isinstance(root, GradientEdge):
            return found
        return {self._forwards.find(n) for letter, n in self._table.get(root) if letter == "F"}

    def _variable(self, target: Any) -> Any:
        return getattr(target.node, "variable", None) if isinstance(target, GradientEdge) else target
