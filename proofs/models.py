"""The models of communication: what a rank waits for, and when a message counts as sent.

In all of them messages carry no tag.  Between an ordered pair of ranks the k-th send matches the k-th receive, and the
messages of a slot are posted together.  A rank runs its computes in order and posts its message slots in order; it
posts one only after the computes before it.  The models differ in two things:

=========  ==============================================  ================================================
model      a send completes when                           a compute waits for
=========  ==============================================  ================================================
blocking   its receive is posted                           every message slot before it
eager(c)   the receive c messages before it is posted      every message slot before it
stream     its receive is posted                           the message slots that bring what it needs
=========  ==============================================  ================================================

A receive completes when its send is posted, and a message slot when all its messages have completed; only then is the
next message slot posted.  A program has run to its end when every message that it sent has been received as well.

*blocking* is ``batch_isend_irecv`` and wait, the strictest.  *eager* has a buffer of ``capacity`` messages for each
ordered pair of ranks: the k-th send needs room in it, which there is once the receive of message k - c is posted (the
first c sends need nothing).  Capacity 0 is blocking.  *stream* is NCCL with all message slots on one communicator: the
host posts without waiting, the message slots run one after the other on the communicator's stream, each after the
computes that were issued before it, and computes run meanwhile on a stream of their own.

The other two only remove waits, so a schedule without deadlock under *blocking* has none under the others.  *stream*
removes no wait that matters for deadlock: a message slot waits in any case for the message slots before it, which are
all that the computes in between wait for under *blocking*.  The checks rely on neither fact: each model is decided by
itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dualpipe.errors import RuleError, nearest


class ModelError(RuleError):
    """A text that is not the name of a model of communication."""


@dataclass(frozen=True)
class Model:
    """A model of communication.

    ``capacity`` counts the messages that an ordered pair of ranks buffers.  With ``overlaps`` a compute waits only for
    the message slots that bring what it needs.
    """

    name: str
    capacity: int = 0
    overlaps: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.capacity}" if self.capacity > 1 else self.name


BLOCKING = Model("blocking")
STREAM = Model("stream", overlaps=True)


def eager(capacity: int = 1) -> Model:
    """The model with buffered sends: ``capacity`` messages, 1 or more, for each ordered pair of ranks."""
    if capacity < 1:
        raise ModelError("an eager model must buffer at least one message", f"got {capacity}", "use blocking for none")
    return Model("eager", capacity)


EAGER = eager()
MODELS = (BLOCKING, EAGER, STREAM)


def parse_models(text: str) -> tuple[Model, ...]:
    """The models that a text names: ``all``, ``blocking``, ``eager``, ``eager:3`` (its capacity) or ``stream``."""
    if text == "all":
        return MODELS
    for model in MODELS:
        if text == model.name:
            return (model,)
    found = re.fullmatch(r"eager:([0-9]{1,9})", text)
    if re.fullmatch(r"eager:[0-9]{10,}", text):
        raise ModelError(
            "an eager model may buffer at most 999999999 messages", f"got {text[:40]!r}", "name a smaller capacity"
        )
    if found is None:
        fix = nearest(text, ["all", *(model.name for model in MODELS)], "name one")
        raise ModelError("a model must be all, blocking, eager, eager:CAPACITY or stream", f"got {text!r}", fix)
    return (eager(int(found.group(1))),)
