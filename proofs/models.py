"""The models of communication: what a rank waits for, and when a message counts as sent.

In all of them messages carry no tag.  Between an ordered pair of ranks the k-th message sent meets the k-th receive
posted, and the messages of a slot are posted together as one *group*.  A rank runs its computes in order and posts
its groups in order; it posts a group only after the computes that stand before it.  The models differ in two things:

=========  ==========================================  =======================================
model      a send is over when                         a compute waits for
=========  ==========================================  =======================================
blocking   its receive is posted                       every group that stands before it
eager(c)   the receive c places before it is posted    every group that stands before it
stream     its receive is posted                       the groups that bring what it needs
=========  ==========================================  =======================================

A receive is over when its send is posted, a group when all its messages are over, and the next group is posted only
then.  A program has run to its end when every message it sent has also been received.

*blocking* is ``batch_isend_irecv`` and wait, the strictest.  *eager* has a buffer of ``capacity`` messages for each
ordered pair of ranks: the k-th send needs a place in it, which is free as soon as the receive of message k - c
is posted (the first c need nothing).  Capacity 0 is blocking.  *stream* is NCCL with all groups on one
communicator: the host posts without waiting, the groups run one after the other on the communicator's stream, each
after the computes that were issued before it, and computes go on meanwhile on a stream of their own.

Each of the other two only takes waits away, so what is free of deadlock when blocking is free of it in all three.
*stream* takes none away that matters for deadlock alone: a group waits for the groups before it in any case, and so
for all that the computes between them would have waited for.  The checks lean on neither of these facts: each model
is decided by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dualpipe.errors import RuleError, nearest


class ModelError(RuleError):
    """A text that names no model of communication."""


@dataclass(frozen=True)
class Model:
    """A model of communication.

    ``capacity`` counts the messages that an ordered pair of ranks buffers; ``overlaps`` says whether a compute
    waits only for the groups that bring what it needs.
    """

    name: str
    capacity: int = 0
    overlaps: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.capacity}" if self.capacity > 1 else self.name


BLOCKING = Model("blocking")
STREAM = Model("stream", overlaps=True)


def eager(capacity: int = 1) -> Model:
    """Sends that are buffered: ``capacity`` messages, 1 or more, for each ordered pair of ranks."""
    if capacity < 1:
        raise ModelError("an eager model buffers at least one message", f"got {capacity}", "use blocking for none")
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
            "an eager model buffers at most 999999999 messages", f"got {text[:40]!r}", "name a smaller capacity"
        )
    if found is None:
        fix = nearest(text, ["all", *(model.name for model in MODELS)], "name one")
        raise ModelError("a model is all, blocking, eager, eager:CAPACITY or stream", f"got {text!r}", fix)
    return (eager(int(found.group(1))),)
