"""With which weight a loss enters the gradient: by what the program multiplies and divides it before the backward.

The engine brings the derivative of the root to every node of the graph.  From the root down to the loss there are only
products with numbers, means, sums and views; behind them begins the loss itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .graph import is_marked

_SCALES = frozenset({"Mul", "Div"})
_REDUCES = frozenset({"Mean", "Sum"})
_KEEPS = frozenset(
    {"Neg", "View", "ReshapeAlias", "UnsafeView", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Alias", "T", "Transpose"}
)
_LOSSES = frozenset(
    {"NllLoss", "NllLoss2D", "MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "KlDiv", "Pow"}
    | {"BinaryCrossEntropyWithLogits", "LogSoftmax", "Log", "Exp", "Abs", "Softplus", "Tanh", "Sigmoid", "Norm"}
)
"""Nodes behind which no factor of the loss can be."""
_KEY = "dualpipe.record.weight"  # in a node's metadata: the weight of the loss that is its result


class Weight:
    """The weight of one loss, known after the engine has run from ``root``.

    ``whole`` is the derivative with respect to the scalar that the program multiplies or divides, and ``mean`` that
    with respect to the mean of the elements that this scalar reduces.  The weight is ``certain`` if the graph shows all
    factors: in a sum of several losses, or in a function of the program, there may be more.
    """

    def __init__(self, root: Tensor) -> None:
        self._found: dict[str, float] = {}
        self._certain, self._of_elements = True, False
        node: Any = root.grad_fn
        reduced = False
        if node is not None:
            node.metadata[_KEY] = self
        while node is not None:
            kind = type(node).__name__.partition("Backward")[0]
            after = [following for following, _ in node.next_functions if following is not None]
            of_module = reduced and is_marked(node)
            passes = kind in _SCALES | _REDUCES | _KEEPS and len(after) == 1 and not of_module
            if not reduced and (kind in _REDUCES or not passes):
                reduced = True
                self._watch(node, "whole")
            elif reduced and passes and kind in _SCALES:
                self._of_elements = True
            if not passes:
                self._watch(node, "mean")
                self._certain = of_module or kind in _LOSSES
                return
            node = after[0]

    @classmethod
    def of(cls, root: Tensor, partial: bool) -> Weight | None:
        """The weight of a new loss; ``None`` if the engine has run from it before.

        A second run adds the gradient again, unless it is ``partial``: for some inputs only.
        """
        node: Any = root.grad_fn
        known = None if node is None else node.metadata.get(_KEY)
        if known is None:
            return cls(root)
        known._certain = known._certain and partial
        known._found = known._found if partial else {}
        return None

    def _watch(self, node: Any, which: str) -> None:
        def note(gradients: tuple[Tensor | None, ...]) -> None:
            with _disable_current_modes():
                given = [float(gradient.double().sum()) for gradient in gradients if gradient is not None]
                self._found.setdefault(which, abs(sum(given)))

        node.register_prehook(note)

    def found(self) -> dict[str, float] | None:
        """``whole`` and ``mean``, and ``certain`` as 1 or 0; ``None`` if they could not be determined."""
        if "whole" not in self._found or "mean" not in self._found:
            return None
        whole = {} if self._of_elements else {"whole": self._found["whole"]}
        return {**whole, "mean": self._found["mean"], "certain": float(self._certain)}
