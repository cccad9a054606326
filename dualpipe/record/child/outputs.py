"""The outputs of forwards in autograd graphs: from their nodes it is known which backward a run of the engine is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import graph
from .forwards import Forwards
from .marks import Mark

Reach = Callable[[int, Sequence[Any]], None]
"""Called when the engine is about to run the node of an output, with its forward and the gradients."""


class Outputs:
    """Marks the nodes of what a module call returns, and of what is sent although no call has returned it."""

    def __init__(self, forwards: Forwards, reach: Reach) -> None:
        self._forwards, self._reach = forwards, reach

    def returned(self, forward: int, output: Any) -> list[Any]:
        """A forward returns ``output``, any nest of tensors; returns the nodes of these."""
        nodes = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for node in nodes:
            if node is not None:
                self._mark(node, forward)
        return nodes

    def sent(self, tensor: Tensor, content: Iterable[Mark]) -> None:
        """A tensor with this content is sent.  A module may have put it into a queue and returned nothing."""
        made_by = [number for letter, number in content if letter == "F"]
        if tensor.grad_fn is not None and len(made_by) == 1 and not graph.marks_below(tensor):
            self._mark(tensor.grad_fn, made_by[0])

    def _mark(self, node: Any, forward: int) -> None:
        graph.mark(node, forward)
        node.register_prehook(partial(self._reach, forward))
        self._forwards.put_in_graph(self._forwards.find(forward))
