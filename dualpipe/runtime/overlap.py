"""Calls ``overlapped_forward_backward``, with which a class of stages runs an F and a B at once.

The contract is that of https://github.com/deepseek-ai/DualPipe (``dualpipe/dualpipe.py``)::

    class Stage(nn.Module):
        @classmethod
        def overlapped_forward_backward(
            cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1
        ):
            return outputs0, loss0

It runs the forward of ``module0`` on ``inputs0``, with the criterion (else ``None``) on the last stage, and the
backward of ``module1``: that of ``loss1`` on the last stage, elsewhere that of ``outputs1`` with ``output_grads1``.
The two are independent, and the method decides which of their parts run at the same time.  It is called for an F and a
B in one slot, if the modules of both chunks are of the same type.  Release 1.0.0 of the package spells it
``overlaped_forward_backward``, which is called as well.

``outputs1`` are kept from F to B, other than without the method.  Where the schedule has W in a later slot, the method
runs with the weight gradients of ``module1`` deferred, as any B does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any, NamedTuple

from torch import nn
from torch.autograd.graph import get_gradient_edge

from dualpipe.errors import StageError
from dualpipe.runtime.live import Tensors
from dualpipe.runtime.program import Overlaps
from dualpipe.schedule import Chunk, Op

NAMES = ("overlapped_forward_backward", "overlaped_forward_backward")
"""In DeepSeek's repository, and in release 1.0.0; where a class has both, the first one is called."""


class Forwards(NamedTuple):
    """The F of a pair; ``criterion`` and ``labels`` on the last stage only."""

    module: nn.Module
    inputs: Tensors
    criterion: Callable[..., Any] | None
    labels: Tensors


def method_of(module: nn.Module) -> Callable[..., Any] | None:
    """The method with which the class of a module runs two of its modules at once, if it has one."""
    found = (getattr(type(module), name, None) for name in NAMES)
    return next((method for method in found if callable(method)), None)


def find_overlaps(stages: Mapping[Chunk, nn.Module]) -> Overlaps:
    """The chunks (of F, of B) whose class can run them at once."""
    return frozenset(
        (f, b) for f, b in permutations(stages, 2) if type(stages[f]) is type(stages[b]) and method_of(stages[f])
    )


def run_overlapped(
    f: Op, forwards: Forwards, b: Op, module: nn.Module, outputs: Tensors, gradients: Tensors, last: bool
) -> tuple[object, object]:
    """Call the method for the F ``f`` and the B ``b`` of ``module``; returns the outputs and the loss of the F.

    ``outputs`` are where the backward starts: with ``gradients``, or if ``b`` is on the ``last`` stage the loss.
    Raises ``StageError`` for a method that returns something else, or leaves out the backward.
    """
    method = method_of(module)
    assert method is not None
    started: set[int] = set()
    nodes = [get_gradient_edge(output).node for output in outputs]
    hooks = [node.register_prehook(lambda _, number=number: started.add(number)) for number, node in enumerate(nodes)]
    try:
        returned = method(
            forwards.module,
            list(forwards.inputs),
            forwards.criterion,
            list(forwards.labels),
            module,
            outputs[0] if last else None,
            [] if last else list(outputs),
            [] if last else list(gradients),
        )
    finally:
        for hook in hooks:
            hook.remove()
    rule = f"{method.__name__} must return its outputs and loss, and run the backward"
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        got = f"at {f} beside {b} it returned {type(returned).__name__}"
        raise StageError(rule, got, "return (outputs0, loss0); loss0 is None without a criterion")
    if len(started) < len(nodes):
        what = "loss1" if last else f"{len(nodes) - len(started)} of {len(nodes)} outputs1"
        raise StageError(rule, f"at {f} beside {b} it ran no backward from {what}", "start one from each")
    outputs0, loss0 = returned
    return outputs0, loss0
