"""The tensors that cross the boundaries between stages: as declared, or with shapes that are exchanged before them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dualpipe.errors import StageError
from dualpipe.runtime.live import Tensors, differentiable
from dualpipe.runtime.program import Post
from dualpipe.runtime.transport import Message, TensorSpec, Transport
from dualpipe.schedule import Lane, Op

Boundary = Callable[[int], Sequence[TensorSpec]]
"""The tensors that the stage with this number gives to the next one."""


class Boundaries:
    """What each message of a step contains.

    ``declared`` gives shapes and dtypes by the sending stage.  Of a microbatch whose shapes were exchanged, only the
    dtypes and the numbers of dimensions are those declared.
    """

    def __init__(self, declared: Boundary) -> None:
        self.declared = declared
        self._specs: dict[tuple[int, bool], list[TensorSpec]] = {}
        self._exchanged: dict[tuple[int, Lane, int], list[TensorSpec]] = {}  # by boundary, lane and microbatch
        self._sent: dict[int, Message] = {}  # by register, the shapes of activations that are not sent yet

    def specs(self, post: Post) -> Sequence[TensorSpec]:
        """The tensors of a message: those of the boundary that it crosses, gradients for the floating ones alone."""
        if self._exchanged:
            exchanged = self._exchanged[post.crossed, post.op.lane, post.op.mb]
            return [spec for spec in exchanged if post.forwards or differentiable(spec.dtype)]
        found = self._specs.get((post.crossed, post.forwards))
        if found is None:
            declared = self.declared(post.crossed)
            found = [spec for spec in declared if post.forwards or differentiable(spec.dtype)]
            self._specs[post.crossed, post.forwards] = found
        return found

    def exchange(self, posts: Sequence[Post], outputs: Callable[[Post], Tensors], transport: Transport) -> None:
        """Send and receive the shapes of the activations of a slot, and wait for those received.

        ``outputs`` gives the tensors of a send.  A message of shapes is one int64 vector, with the sizes of the first
        tensor, then those of the second.
        """
        messages = [self._send(post, outputs(post)) if post.sends else self._receive(post) for post in posts]
        transport.post(messages)
        for post, message in zip(posts, messages, strict=True):
            if not post.sends:
                sizes = iter(transport.wait(message)[0].tolist())
                self._keep(post, [tuple([next(sizes) for _ in spec.shape]) for spec in self.declared(post.crossed)])

    def shapes_of(self, post: Post) -> Message | None:
        """The message with the shapes of an activation that is about to be sent, if they were sent."""
        return self._sent.pop(post.register, None)

    def _send(self, post: Post, tensors: Tensors) -> Message:
        require_specs(post.op, tensors, self.declared(post.crossed), exact=False)
        self._keep(post, [tuple(tensor.shape) for tensor in tensors])
        sizes = [size for tensor in tensors for size in tensor.shape]
        vector = torch.tensor(sizes, dtype=torch.int64, device=tensors[0].device)
        self._sent[post.register] = message = Message(_label(post), post.peer, True, (vector,))
        return message

    def _receive(self, post: Post) -> Message:
        sizes = sum(len(spec.shape) for spec in self.declared(post.crossed))
        return Message(_label(post), post.peer, False, (), (TensorSpec((sizes,), torch.int64),))

    def _keep(self, post: Post, shapes: Sequence[tuple[int, ...]]) -> None:
        declared = self.declared(post.crossed)
        specs = [TensorSpec(shape, spec.dtype) for shape, spec in zip(shapes, declared, strict=True)]
        self._exchanged[post.crossed, post.op.lane, post.op.mb] = specs


def _label(post: Post) -> str:
    return f"the shapes of {post.label}"


def require_specs(op: Op, tensors: Tensors, specs: Sequence[TensorSpec], exact: bool = True) -> None:
    """Raise ``StageError`` unless a stage gives the tensors that the boundary declares.

    If not ``exact``, of a shape the number of dimensions counts alone.
    """
    if len(tensors) == len(specs) and all(
        tensor.dtype is dtype and (tensor.shape == shape if exact else tensor.dim() == len(shape))
        for tensor, (shape, dtype) in zip(tensors, specs, strict=True)
    ):
        return
    found = [TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
    raise StageError(
        "a stage must return the tensors that its boundary declares",
        f"{op} sends {', '.join(map(str, found))} where the boundary is {', '.join(map(str, specs)) or 'empty'}",
        "declare the shapes and dtypes that the stage returns",
    )
