"""Marks in the nodes of autograd graphs: the forward that made a node, and the outputs that the engine has run from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

_FORWARD = "dualpipe.record"  # in a node's metadata: the number of the forward that made it
_RAN = "dualpipe.record.ran"  # in a node's metadata: the outputs from which the engine has run


def mark(node: Any, forward: int) -> None:
    """Note the forward that made a node."""
    node.metadata[_FORWARD] = forward


def is_marked(node: Any) -> bool:
    """Whether a node made the output of a forward."""
    return _FORWARD in node.metadata


def marks_below(root: Tensor | GradientEdge) -> set[int]:
    """The forwards noted at the first marked nodes on every path from ``root``."""
    return {node.metadata[_FORWARD] for node in marked_below(root)}


def marked_below(root: Tensor | GradientEdge) -> Iterator[Any]:
    """The first marked nodes on every path from ``root``."""
    seen: set[Any] = set()
    nodes = [_node(root)]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_marked(node):
            yield node
        else:
            nodes.extend(following for following, _ in node.next_functions)


def nodes_below(node: Any) -> Iterator[Any]:
    """A node and all nodes behind it."""
    seen: set[Any] = set()
    nodes = [node]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            nodes.extend(following for following, _ in node.next_functions)


def functions_of(outputs: Iterable[Tensor], leaves: Mapping[int, Tensor]) -> dict[int, str]:
    """The functions of the program whose backward gives a leaf its gradient: ``Linear.backward at layers.py:36``."""
    numbers = {id(leaf): number for number, leaf in leaves.items()}
    found: dict[int, str] = {}
    for node in {node for output in outputs for node in nodes_below(output.grad_fn)}:
        backward: Any = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if not hasattr(backward, "__code__"):
            continue
        place = f"{backward.__code__.co_filename}:{backward.__code__.co_firstlineno}"
        for after, _ in node.next_functions:
            number = numbers.get(id(getattr(after, "variable", None)))
            if number is not None:
                found[number] = f"{backward.__qualname__} at {place}"
    return found


def has_run(roots: Sequence[Any]) -> bool:
    """Whether the engine has run from one of the roots before; from now on it has from all of them."""
    before = False
    for root in roots:
        node = _node(root)
        if node is not None:
            ran = node.metadata.setdefault(_RAN, set())
            before = before or root.output_nr in ran
            ran.add(root.output_nr)
    return before


def _node(root: Any) -> Any:
    return root.node if isinstance(root, GradientEdge) else root.grad_fn
