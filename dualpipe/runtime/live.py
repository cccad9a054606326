"""A live microbatch: what a stage keeps between F and B, the leaves that B fills, and where B starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dualpipe.errors import StageError
from dualpipe.runtime.transport import writes
from dualpipe.schedule import Chunk, Op

logger = logging.getLogger("dualpipe.runtime.executor")

Tensors = tuple[Tensor, ...]


class Live(NamedTuple):
    """``inputs`` are leaves; the backward starts at ``roots``, with ``seeds`` if the stage has computed the loss.

    ``outputs`` are what the roots are of, kept only for a B in an F&B pair.
    """

    inputs: Tensors
    roots: tuple[GradientEdge | None, ...]
    seeds: Tensors = ()
    outputs: Tensors = ()

    @classmethod
    def of(cls, inputs: Tensors, outputs: Tensors) -> Live:
        """After an F whose outputs go to the next stage."""
        return cls(inputs, tuple([_edge(output) for output in outputs if differentiable(output.dtype)]))

    @classmethod
    def of_loss(cls, op: Op, inputs: Tensors, outputs: Tensors) -> Live:
        """After the F of the last stage, which computes the loss.  Raises ``StageError`` if that has no gradient."""
        (loss,) = outputs
        if not loss.requires_grad:
            raise StageError(
                "training needs a loss with a gradient",
                f"at {op} the loss depends on nothing that requires one (it is detached, or was computed without "
                "autograd)",
                "return the loss as it was computed, or evaluate with forward_only",
            )
        return cls(inputs, (_edge(loss),), (torch.ones_like(loss),))

    def roots_of(self, seeds: Tensors) -> tuple[tuple[GradientEdge, ...], Tensors]:
        """Where the backward starts, and with which of the ``seeds``: an output without a gradient is left out."""
        pairs = [(root, seed) for root, seed in zip(self.roots, seeds, strict=True) if root is not None]
        return tuple([root for root, _ in pairs]), tuple([seed for _, seed in pairs])

    @property
    def differentiated(self) -> Tensors:
        """Those of the outputs where the backward starts."""
        return tuple([output for output in self.outputs if differentiable(output.dtype) and output.requires_grad])

    def gradients(self, op: Op, warned: set[Chunk]) -> Tensors:
        """The gradients of a stage's inputs, with zeros for an input that the stage did not use: the peer expects one.

        Autograd in one process would leave the gradients before it ``None``, which an optimizer may treat differently,
        so such a chunk is named in the log, once.
        """
        leaves = [leaf for leaf in self.inputs if differentiable(leaf.dtype)]
        gradients = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        missing = [number for number, gradient in enumerate(gradients) if gradient is None]
        if missing and len(missing) == len(leaves):
            raise StageError(
                "a stage must pass a gradient on to the stage before it",
                f"at {op} its output does not depend on its input (which is detached, or used without autograd)",
                "leave the input in the graph, or train only the stages after it",
            )
        if missing and op.chunk not in warned:
            warned.add(op.chunk)
            logger.warning(
                "dualpipe: %s does not use its inputs %s at %s; the stage before gets zeros for their gradients, where "
                "autograd in one process would leave None",
                op.chunk, missing, op,
            )  # fmt: skip
        return tuple([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)])


class Output(NamedTuple):
    """The tensors that an F or B produced for another stage, with their versions (autograd's counts of writes)."""

    tensors: Tensors
    versions: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Output:
        return cls(tuple(tensors), tuple([writes(tensor) for tensor in tensors]))

    def unchanged(self, op: Op, producer: Op | None) -> Tensors:
        """The tensors, for ``op``.  Raises ``StageError`` if something has written to them since."""
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if writes(tensor) != version:
                raise StageError(
                    "a stage must not write to what it returned until that is used",
                    f"{op} finds that the output of {producer} was written to since",
                    "return a new tensor for each microbatch, not a buffer that is used again",
                )
        return self.tensors


def differentiable(dtype: torch.dtype) -> bool:
    """Whether tensors of this dtype have gradients, so that one is sent back."""
    return dtype.is_floating_point or dtype.is_complex


def leaf_of(tensor: Tensor) -> Tensor:
    """What a stage gets of a tensor from another stage: a leaf that collects the gradient, if there is to be one."""
    leaf = tensor.detach()
    return leaf.requires_grad_() if torch.is_grad_enabled() and differentiable(leaf.dtype) else leaf


def _edge(output: Tensor) -> GradientEdge | None:
    """Where the backward of ``output`` starts.  It outlives the tensor, so a sent output (or the base of a view)
    is freed as soon as autograd itself no longer needs it."""
    return get_gradient_edge(output) if output.requires_grad else None
