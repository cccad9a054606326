"""The queue between B and W: weight gradients that B leaves for a later W.

``dualpipe.runtime.split_linear`` feeds it from linear layers.  It reproduces autograd's own sums: autograd adds up what
one backward contributes to a parameter, in the order of the backward, then adds the sum to ``.grad`` once; so a layer
that a microbatch uses twice, or a weight that two layers share, has the bits of the whole backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Closure = Callable[[], None]


class WeightGradError(RuntimeError):
    """A weight gradient that cannot be computed apart from its B, is not in the queue, or was left in it."""


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
        """Why the products would not have the bits of the whole backward; ``None`` if they have."""

    def output(self, x: Tensor) -> Tensor: ...

    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        """``weight`` is what F has computed with."""

    def weight_gradients(self, x: Tensor, dy: Tensor) -> Sequence[Tensor]:
        """One gradient for each of ``trained``, in that order."""


def training(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Those of a layer's weight and bias that require a gradient now."""
    if bias is None or not bias.requires_grad:
        return (weight,) if weight.requires_grad else ()
    return (weight, bias) if weight.requires_grad else (bias,)


_Sum = tuple[int, int]
"""Names the sum that autograd makes for a parameter in one backward."""


@dataclass(slots=True, eq=False)
class _Deferred:
    """A weight gradient that W computes; ``sums`` names for each trained parameter the sum that it belongs to."""

    use: Use
    x: Tensor
    dy: Tensor
    sums: Sequence[_Sum]
    versions: tuple[int, int]

    def gradients(self) -> Sequence[Tensor]:
        if self.versions != (self.x._version, self.dy._version):
            raise WeightGradError(
                f"a linear layer's input and output gradient stay as they are until W: those of {self.use.name} were "
                "modified in place after B; do not reuse the buffer, or build the pipeline with split_backward=False"
            )
        return self.use.weight_gradients(self.x, self.dy)


class WeightGradStore:
    """The weight gradients of one rank that B has left to W, by microbatch.

    A key is any hashable name of a microbatch at a stage.  There is no global state: whoever runs a pipeline owns
    its store.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, deque[Closure | _Deferred]] = {}
        self.key: Hashable | None = None
        """The microbatch whose backward is running and leaves its weight gradients to W; ``None`` at other times."""

    @contextmanager
    def collecting(self, key: Hashable | None) -> Iterator[None]:
        """Around a B: within it weight gradients may be deferred to ``run(key)``; with ``None`` they may not."""
        outer = self.collect(key)
        try:
            yield
        finally:
            self.key = outer

    def collect(self, key: Hashable | None) -> Hashable | None:
        """From now on weight gradients may be deferred to ``run(key)``; returns the ``key`` until now."""
        if key is not None:
            self._waiting.setdefault(key, deque())
        outer, self.key = self.key, key
        return outer

    def put(self, closure: Closure) -> None:
        """Keep the computation of a weight gradient for the W of the microbatch whose B is running."""
        self._queue().append(closure)

    def defer(self, use: Use, x: Tensor, dy: Tensor) -> None:
        """Keep a linear layer's input and output gradient; called from within autograd's backward."""
        run = torch._C._current_graph_task_id()
        sums = [_sum_of(run, parameter) for parameter in use.trained]
        self._queue().append(_Deferred(use, x, dy, sums, (x._version, dy._version)))

    def _queue(self) -> deque[Closure | _Deferred]:
        if self.key is None:
            raise WeightGradError("a weight gradient is left to W in a B that is split: no such B is running")
        return self._waiting[self.key]

    def waiting(self, key: Hashable) -> int:
        """How many weight gradients B has left to the W of ``key``."""
        return len(self._waiting.get(key, ()))

    def run(self, key: Hashable) -> None:
        """Compute and accumulate what waits under ``key``, in the order in which the backward left it.

        A gradient is added to ``.grad`` by autograd's own accumulation, so that hooks on the parameter run.  Raises
        ``WeightGradError`` when there is nothing: no B has run, or W has run already; and where an input of the
        products was modified since.
        """
        entries = self._waiting.pop(key, None)
        if entries is None:
            raise WeightGradError(f"no weight gradient waits for {key}: its B has not run, or its W already has")
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
                torch.autograd.backward(complete, sums)

    def clear(self) -> None:
        """Drop what waits: the step that left it failed, and the next one's keys are the same."""
        self._waiting.clear()

    def require_empty(self) -> None:
        """Raise ``WeightGradError`` naming every key whose W never came."""
        if self._waiting:
            keys = ", ".join(map(str, self._waiting))
            raise WeightGradError(f"the step ended and these weight gradients were never computed: {keys}")


def _sum_of(run: int, parameter: Tensor) -> _Sum:
    """``run``: autograd's number of the backward."""
    return run, id(parameter)
