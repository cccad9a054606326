"""The ends of a forward's autograd graph beyond its modules: where it begins, and from where the engine runs.

A program may compute further outside of a module: it casts what it receives, or applies an activation to the output and
sends the result.  Then the neighbouring stages see the leaf and the root of the graph, and not the module's own input
and output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .engine import Engine
from .flow import Flow
from .graph import nodes_below
from .log import program_line
from .regions import copied, is_readable
from .replay import Call, Leaf, Total, leaf_of


@dataclass
class Beginning:
    """A leaf of a graph: its value, and the gradient that each run of the engine brought to it, with the line."""

    value: Tensor
    parts: list[tuple[str, Tensor]] = field(default_factory=list)


@dataclass
class Root:
    """A tensor from which the engine runs with a gradient, and the sum of its gradients."""

    value: Tensor
    total: Total


class Edges:
    """The leaves and the roots of every forward of a rank."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._leaves: dict[int, dict[Leaf, Beginning]] = {}
        self._roots: dict[int, dict[Leaf, Root]] = {}

    def begins(self, forward: int, leaves: Iterable[Tensor]) -> None:
        """The graph of a forward begins at these leaves: watch what gradients they get."""
        known = self._leaves.setdefault(forward, {})
        for leaf in leaves:
            if leaf_of(leaf) not in known:
                with _disable_current_modes():
                    begins = known[leaf_of(leaf)] = Beginning(copied(leaf))
                add = functools.partial(self._add, forward, begins)
                leaf.register_hook(add)  # type: ignore[no-untyped-call] # torch's own

    def _add(self, forward: int, begins: Beginning, gradient: Tensor | None) -> None:
        # and not for a later one whose graph begins in the same memory
        if gradient is not None and self._flow.runs_for(forward):
            with _disable_current_modes():
                begins.parts.append((program_line(), copied(gradient)))

    def run_from(self, forward: int, root: Tensor, gradient: Tensor, spares: bool, calls: Iterable[Call]) -> None:
        """The engine is about to run from a root of a forward, for the input alone if it ``spares`` the weights."""
        with _disable_current_modes():
            copy = copied(gradient)
            roots = self._roots.setdefault(forward, {})
            if leaf_of(root) not in roots:
                roots[leaf_of(root)] = Root(_value_of(root, calls), Total())
            roots[leaf_of(root)].total.add(copy, spares)
            for call in calls if root.grad_fn is None else ():  # a module's input that it returns has no node to watch
                for at, known in enumerate(call.returned):
                    if known == leaf_of(root):
                        call.reached(at, copy, spares)

    def forget(self) -> None:
        """Forget all forwards so far."""
        self._leaves.clear()
        self._roots.clear()

    def of(self, forward: int) -> dict[str, Any]:
        """What the file of the rank has for a forward."""
        find = self._flow.find
        leaves = [leaf for n, each in self._leaves.items() if find(n) == forward for leaf in each.values()]
        roots = [root for n, each in self._roots.items() if find(n) == forward for root in each.values()]
        return {
            "leaves": [(leaf.value, leaf.parts) for leaf in leaves],
            "roots": [(root.value, root.total.gradient) for root in roots],
        }


class Observed(Engine):
    """Notes the tensors from which the engine runs, their gradients, and for which inputs.

    ``within`` gives the context of each run.
    """

    def __init__(
        self,
        note: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], None],
        within: Callable[[], AbstractContextManager[None]],
        engine: Any,
    ) -> None:
        super().__init__(engine)
        self._note, self._within = note, within

    def run_backward(self, tensors: Any, grad_tensors: Any = (), *args: Any, **kwargs: Any) -> Any:
        inputs = args[2] if len(args) > 2 else kwargs.get("inputs", ())
        self._note(tuple(tensors), tuple(grad_tensors or ()), tuple(inputs or ()))
        with self._within():
            return self._engine.run_backward(tensors, grad_tensors, *args, **kwargs)


def _value_of(root: Tensor, calls: Iterable[Call]) -> Tensor:
    """The value of a root, as the call that returned it had it, if the program has freed its memory since."""
    if not is_readable(root):
        for call in calls:
            for at, known in enumerate(call.returned):
                if known == leaf_of(root):
                    return call.outputs[at]
    return copied(root)


def leaves_below(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors at which the graphs of these begin."""
    for tensor in tensors:
        if tensor.grad_fn is None and tensor.requires_grad:
            yield tensor
        for node in nodes_below(tensor.grad_fn):
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor):
                yield variable
