"""The queue between B and W: weight gradients that B defers to W.

``dualpipe.runtime.split_stage`` feeds it from linear layers.  It reproduces autograd's own sums.  Autograd adds up what
one backward contributes to a parameter, in the order of the backward, then adds the sum to ``.grad`` once.  The queue
does the same, so a layer that a microbatch uses twice, or a weight that two layers share, gets the gradient of the full
backward, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, _engine_run_backward

Closure = Callable[[], None]


class WeightGradError(RuntimeError):
    """A weight gradient that cannot be computed apart from its B, was not deferred, or was never computed."""


class Use(Protocol):
    """One use of a linear layer in a forward: the weights that it computed with, and its three products.

    ``x`` is the layer's input ``[..., in]``, ``dy`` the gradient of its output ``[..., out]``.
    """

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """Those of weight and bias that required a gradient when the layer ran, in that order."""

    def unfit(self, x: Tensor) -> str | None:
        """Why the products would differ in bits from those of the full backward; ``None`` if they are equal."""

    def output(self, x: Tensor) -> Tensor: ...

    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """``weight`` has the data that F computed with."""

    def weight_gradients(self, x: Tensor, dy: Tensor) -> Sequence[Tensor]:
        """One gradient for each of ``trained``, in that order."""


def training(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Those of a layer's weight and bias that require a gradient now."""
    if bias is None or not bias.requires_grad:
        return (weight,) if weight.requires_grad else ()
    return (weight, bias) if weight.requires_grad else (bias,)


_Sum = tuple[int, int]
"""Identifies the sum that autograd makes for a parameter in one backward."""


@dataclass(slots=True, eq=False)
class _Deferred:
    """The weight gradient of one use of a layer; ``sums`` identifies the sum of each trained parameter."""

    use: Use
    x: Tensor
    dy: Tensor
    sums: Sequence[_Sum]
    versions: tuple[int, int]

    def gradients(self) -> Sequence[Tensor]:
        if self.versions != (self.x._version, self.dy._version):
            raise WeightGradError(
                f"a linear layer's input and output gradient must not change until W: those of {self.use.name} were "
                "modified in place after B; do not reuse the buffer, or build the pipeline with split_backward=False"
            )
        return self.use.weight_gradients(self.x, self.dy)


def run_backward(roots: Sequence[Tensor | GradientEdge], gradients: Sequence[Tensor]) -> None:
    """``torch.autograd.backward``, without the checks of its arguments in Python: they take as long as the backward of
    a small layer, and the engine compares the shapes again.  Both are tuples."""
    _engine_run_backward(roots, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)


class DeferredGradients:
    """The deferred weight gradients of one rank, by key.

    A key identifies one W; the interpreter uses the op.  There is no global state: each pipeline owns its store.
    """

    def __init__(self) -> None:
        self._deferred: dict[Hashable, deque[Closure | _Deferred]] = {}
        self.key: Hashable | None = None
        """The key that the B now running defers its weight gradients to; ``None`` at other times."""

    @contextmanager
    def deferring_to(self, key: Hashable | None) -> Iterator[None]:
        """A context for a B, in which weight gradients may be deferred to ``run(key)``; with ``None`` they may not."""
        outer = self.defer_to(key)
        try:
            yield
        finally:
            self.key = outer

    def defer_to(self, key: Hashable | None) -> Hashable | None:
        """From now on weight gradients are deferred to ``run(key)``, or refused (``None``); returns the old key."""
        if key is not None:
            self._deferred.setdefault(key, deque())
        outer, self.key = self.key, key
        return outer

    def put(self, closure: Closure) -> None:
        """Defer the computation of a weight gradient to the W of the B that is running."""
        self._queue().append(closure)

    def defer(self, use: Use, x: Tensor, dy: Tensor) -> None:
        """Keep a linear layer's input and output gradient; called from within autograd's backward."""
        run = torch._C._current_graph_task_id()
        sums = [_sum_of(run, parameter) for parameter in use.trained]
        self._queue().append(_Deferred(use, x, dy, sums, (x._version, dy._version)))

    def _queue(self) -> deque[Closure | _Deferred]:
        if self.key is None:
            raise WeightGradError("a weight gradient is deferred in a B that is split: no such B is running")
        return self._deferred[self.key]

    def count(self, key: Hashable) -> int:
        """How many weight gradients are deferred to ``key``."""
        return len(self._deferred.get(key, ()))

    def run(self, key: Hashable) -> None:
        """Compute and accumulate the weight gradients deferred to ``key``, in the order of the backward.

        A gradient is added to ``.grad`` by autograd's own accumulation, so that hooks on the parameter run.  Raises
        ``WeightGradError`` if no B has run or W has run already, and if an input of the products was modified since.
        """
        entries = self._deferred.pop(key, None)
        if entries is None:
            raise WeightGradError(f"no weight gradient is deferred to {key}: its B has not run, or its W already has")
        left: dict[_Sum, int] = {}
        for entry in entries:
            if isinstance(entry, _Deferred):
                for name in entry.sums:
                    left[name] = left.get(name, 0) + 1
        begun: dict[_Sum, Tensor] = {}
        while entries:
            entry = entries.popleft()
            if not isinstance(entry, _Deferred):
                entry()
                continue
            complete: list[Tensor] = []
            sums: list[Tensor] = []
            for parameter, name, gradient in zip(entry.use.trained, entry.sums, entry.gradients(), strict=True):
                total = begun.pop(name) + gradient if name in begun else gradient
                left[name] -= 1
                if left[name]:
                    begun[name] = total
                else:
                    complete.append(parameter)
                    sums.append(total)
            if complete:
                run_backward(tuple(complete), tuple(sums))

    def clear(self) -> None:
        """Drop all deferred gradients: the step that deferred them failed, and the next step has the same keys."""
        self._deferred.clear()

    def require_empty(self) -> None:
        """Raise ``WeightGradError`` with every key whose W has not run."""
        if self._deferred:
            keys = ", ".join(map(str, self._deferred))
            raise WeightGradError(f"the step ended and these weight gradients were never computed: {keys}")


def _sum_of(run: int, parameter: Tensor) -> _Sum:
    """``run`` is autograd's number of the backward."""
    return run, id(parameter)
