"""The losses of one rank: where backwards begin, with which weight, and what the program keeps and reads of them.

A scalar from which the engine runs is taken for a loss, or for a loss times a number.
"""

from __future__ import annotations

import functools
import gc
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import _disable_current_modes

from .flow import Flow
from .graph import marks_below
from .loss_places import LossPlaces
from .patches import Patches
from .weights import Weight

_DEPTH = 4
"""How far a list of losses may be from the losses: in a list of dictionaries, of objects with attributes, ..."""


class Losses:
    """What the program does with the results of its forwards that may be losses.

    ``scalars`` are the values that it read or reduced since its last backward, as those of a norm are.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self.scalars: list[float] = []
        self.places = LossPlaces()
        self._scaled: dict[int, str] = {}  # forward -> the line that scales its loss
        self._read: set[int] = set()
        self._inside: list[tuple[int, Any]] = []  # forwards and values that a module or a backward has read of them
        self._values: dict[int, set[float]] = {}  # forward -> values of its loss that the program read or kept
        self._roots: dict[int, float] = {}  # forward -> the value of the scalar from which its backward began
        self._weights: dict[int, list[Weight]] = {}  # forward -> the weight of each loss in the gradient
        self._begun: set[int] = set()  # forwards from whose loss a backward has begun
        self._collected: set[int] = set()  # forwards whose loss was in a list when a later one's backward began
        self._looking = False  # whether the recorder itself is reading the value of a tensor
        self._done = False

    def watch(self, patches: Patches) -> None:
        """Watch what the program reads and reduces, until ``patches.undo()``."""
        for name in ("item", "tolist", "__float__"):
            patches.put(torch.Tensor, name, self._reading(getattr(torch.Tensor, name)))
        patches.wrap(c10d.all_reduce, self._reducing)
        self.places.watch(patches.later)

    def begin(self, losses: Sequence[Tensor], partial: bool) -> None:
        """The engine is about to run from these scalars; ``partial`` is whether it runs for some inputs only."""
        now = [{self._flow.find(number) for number in marks_below(loss)} for loss in losses]
        if not self._collected:
            self._collected = self._in_lists(self._begun.difference(*now))
        for loss, begun in zip(losses, now, strict=True):
            self._begun |= begun
            self._roots.update(dict.fromkeys(begun, self.value(loss)))
            self._scaled.update(dict.fromkeys(begun, self.places.scaled_at(loss)))
            weight = Weight.of(loss, partial)
            if weight is not None:
                for forward in begun:
                    self._weights.setdefault(forward, []).append(weight)

    def end_step(self, calls: int) -> Mapping[str, Any]:
        """The step ends: what the file of the rank has of its losses; ``calls`` counts the forwards."""
        find = self._flow.find
        self._done = True
        gc.collect()  # what only a cycle of garbage holds, the program does not
        seen = self._read | self._held(max(2, calls))
        seen |= {forward for forward, value in self._inside if self._roots.get(find(forward), None) == value}
        return {
            "seen": sorted(map(find, seen)),
            "scalars": self.scalars,
            "collected": sorted(map(find, self._collected)),
            "dropped": self.places.dropped,
            "scaled": {find(forward): at for forward, at in self._scaled.items()},
            "roots": {find(forward): value for forward, value in self._roots.items()},
            "losses": {find(forward): sorted(values) for forward, values in self._values.items()},
            "loss weights": {find(f): [weight.found() for weight in each] for f, each in self._weights.items()},
        }

    def forget(self) -> None:
        """Forget the losses so far, which belong to a step that the program threw away."""
        for kept in (
            self._read,
            self._inside,
            self._values,
            self._roots,
            self._weights,
            self._begun,
            self._collected,
            self._scaled,
            self.scalars,
            self.places,
        ):
            kept.clear()
        self._done = False

    def read(self) -> list[int]:
        """The forwards of which the program has read a result."""
        return sorted(map(self._flow.find, self._read))

    def value(self, tensor: Tensor) -> float:
        """The value of a scalar, without counting it as read by the program."""
        self._looking = True
        try:
            with _disable_current_modes():
                return float(tensor.detach())
        finally:
            self._looking = False

    def _reading(self, original: Any) -> Any:
        @functools.wraps(original)
        def read(tensor: Tensor, *args: Any) -> Any:
            if self._looking:
                return original(tensor, *args)
            found = self._flow.origins.forwards_of(tensor)
            value = original(tensor, *args)
            if self._flow.calling or self._flow.running:
                self._inside += [(forward, value) for forward in found]
            elif tensor.is_floating_point():
                self._read |= found
            if not self._done and isinstance(value, float):
                self.scalars.append(value)
                self._note(found, value)
            return value

        return read

    def _reducing(self, original: Any) -> Any:
        @functools.wraps(original)
        def reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            work = original(tensor, *args, **kwargs)
            if not self._done and work is None and tensor.numel() == 1 and tensor.is_floating_point():
                self.scalars.append(self.value(tensor))
            return work

        return reduce

    def _note(self, forwards: Iterable[int], value: float) -> None:
        for forward in forwards:
            self._values.setdefault(forward, set()).add(value)

    def _results(self, most: int) -> list[tuple[Tensor, set[int]]]:
        """The results that the program holds, of at most one dimension and ``most`` elements, with their forwards."""
        found = []
        for thing in gc.get_objects():
            if _is_small(thing, most) and thing.is_floating_point():
                forwards = self._flow.origins.forwards_of(thing)
                found += [(thing, forwards)] if forwards else []
        return found

    def _held(self, most: int) -> set[int]:
        """The forwards with a result that the program holds, as one or several scalars: possible losses."""
        held: set[int] = set()
        for thing, forwards in self._results(most):
            held |= forwards
            if thing.numel() == 1:
                self._note(forwards, self.value(thing))
        return held

    def _in_lists(self, forwards: set[int]) -> set[int]:
        """Those of the forwards with a scalar result that is in a list."""
        if not forwards:
            return set()
        results = [(thing, own & forwards) for thing, own in self._results(1) if own & forwards]
        while results:
            thing, own = results.pop()
            if _is_in_list(thing, [results]):
                self.places.follow(thing)
                return own
        return set()


def _is_in_list(thing: object, own: Sequence[object], depth: int = _DEPTH) -> bool:
    """Whether a list holds a thing, perhaps in a dictionary, a tuple or an object; ``own`` are not the program's.

    A tuple or a list in which a larger tensor is beside the thing keeps both for the backward, and collects nothing.
    """
    holders = [each for each in gc.get_referrers(thing) if not isinstance(each, FrameType)]
    for holder in holders:
        if holder is own or any(holder is each for each in own):
            continue
        if isinstance(holder, (list, tuple, deque)) and any(map(_is_large, holder)):
            continue
        if isinstance(holder, (list, deque)):
            return True
        if isinstance(holder, dict) and {"__name__", "__builtins__"} & holder.keys():
            continue  # the variables of a module
        if isinstance(holder, dict) and len(holder) > 1 and all(isinstance(key, int) for key in holder):
            return True  # by microbatch
        is_object = not isinstance(holder, (dict, tuple)) and hasattr(holder, "__dict__")
        nested = isinstance(holder, (dict, tuple)) or is_object
        if depth and nested and not isinstance(holder, type) and _is_in_list(holder, [*own, holders], depth - 1):
            return True
    return False


def _is_small(thing: object, most: int) -> TypeGuard[Tensor]:
    return issubclass(type(thing), Tensor) and thing.dim() <= 1 and 0 < thing.numel() <= most  # type: ignore[attr-defined]


def _is_large(thing: object) -> bool:
    return issubclass(type(thing), Tensor) and thing.numel() > 1  # type: ignore[attr-defined] # a tensor
