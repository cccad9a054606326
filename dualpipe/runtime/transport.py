"""What a transport is: the messages it carries, the errors it raises, and its interface.

``dualpipe.runtime.process_group`` has the transport over torch.distributed; a test may bring its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe.errors import StageError

_SOURCE = re.compile(r"^\[[^]]*\] ")  # gloo's errors begin with the file and line of its own source


class TensorSpec(NamedTuple):
    """The shape and dtype of a tensor that crosses a stage boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(eq=False, slots=True)
class Message:
    """One send or receive.  ``label`` names it in errors, ``peer`` is the pipeline rank at the other end.

    ``tensors`` are those to send, or those received once the message has completed.  ``proves`` are sends that have
    been received once this receive has completed.
    """

    label: str
    peer: int
    sends: bool
    tensors: Sequence[Tensor] = ()
    specs: Sequence[TensorSpec] = ()
    versions: tuple[int, ...] = ()
    works: list[dist.Work] = field(default_factory=list)
    posted: bool = False
    completed: bool = False
    marks: Any = None
    """Shows whether a receive has arrived."""
    shape: Message | None = None
    """Of a send whose shape was sent before it, that message, which the same receives prove."""
    proves: Sequence[Message] = ()

    def release(self) -> None:
        """Let go of a send's tensors.  Raises ``StageError`` if one was written to since the send was posted."""
        if self.sends:
            written = self.versions != tuple([writes(tensor) for tensor in self.tensors])
            self.tensors, self.versions = (), ()
            if written:
                raise StageError(
                    "a stage must not write to what it returned until that is sent",
                    f"a tensor of {self.label} to rank {self.peer} was written to while it was sent",
                    "return a new tensor for each microbatch, not a buffer that is used again",
                )


def writes(tensor: Tensor) -> int:
    """Autograd's count of the writes to a tensor; 0 for one made in inference mode, where it does not count."""
    return 0 if tensor.is_inference() else tensor._version


class Transport(Protocol):
    """What the interpreter needs from a transport; a test may bring its own."""

    rank: int
    ranks: int

    def post(self, messages: Sequence[Message]) -> None: ...

    def wait(self, message: Message) -> Sequence[Tensor]: ...

    def drain(self) -> None: ...

    def agree(self, record: Mapping[str, str]) -> None: ...

    def phase(self, kind: str) -> AbstractContextManager[None]:
        """Entered around a call that exchanges messages, by all ranks in the same order; an error spoils them all."""
        ...

    def close(self) -> None: ...


class MessageError(RuntimeError):
    """A message that did not complete: it timed out, or its peer is gone."""

    def __init__(self, message: Message, seconds: float, cause: BaseException | None) -> None:
        self.message = message
        kind = "send" if message.sends else "receive"
        other = f"{'to' if message.sends else 'from'} rank {message.peer}"
        reason = "it timed out" if cause is None else first_sentence(cause)
        super().__init__(f"{kind} {message.label} {other} failed after {seconds:.1f} s: {reason}")


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's text, or its type; without the place in its source that gloo puts before it."""
    text = _SOURCE.sub("", str(error).strip()) or type(error).__name__
    return text.splitlines()[0].split(". ")[0]


class DisagreementError(RuntimeError):
    """The ranks of a pipeline were set up differently, or a rank is missing."""


class SpoiledError(RuntimeError):
    """A call to a pipeline that was closed, or that failed before, on this rank or another."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"this pipeline cannot be used any more: {reason}; the ranks may have stopped at different places, and "
            "gradients of the step that failed are incomplete: build a new transport and pipeline on every rank, and "
            "load weights and optimizer from a checkpoint"
        )
