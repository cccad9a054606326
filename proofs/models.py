"""The models of communication: what a rank waits for, and when a message counts as sent.

In all of them messages carry no tag.  Between an ordered pair of ranks the k-th send matches the k-th receive.  A rank
runs its computes in order, and each side of a message starts only after the computes before it on its rank.  The models
differ in this:

=========  =======================================================  ==================================================
model      a send completes when                                    a rank waits
=========  =======================================================  ==================================================
blocking   its receive has started                                  at each message slot, until the slot has completed
eager(c)   the receive c places before its own receive has started  at each message slot, until the slot has completed
edge       its receive has started                                  at a compute, for the receives whose data it needs
=========  =======================================================  ==================================================

A receive completes when its send has started.  A program has run to its end when all its messages have completed and
every message that it sent has been received.

*blocking* is ``batch_isend_irecv`` and wait, the strictest.  *eager* has a buffer of ``capacity`` messages for each
ordered pair of ranks.  The k-th send needs room in the buffer; there is room once receive k - c has started (the first
c sends always have room).  Capacity 0 is blocking.  *edge* has a communicator for each ordered pair of ranks, on which
messages complete one by one in the order posted.  The rank posts them without waiting and goes on with its computes.

*stream* has one communicator for all messages, as NCCL has for batches: the message slots run one after the other, and
a compute waits only for the slots whose data it needs.  It gives the verdict of *blocking* on every schedule: what a
rank computes while messages are in flight reaches other ranks only through later message slots, and under both models
these wait for every earlier one.  So ``all`` leaves *stream* out.  Plain search decides it by deciding blocking; Z3
uses the definition of *stream* itself.

A collective behaves the same under every model: it starts after everything that its rank posted before it has
completed, and the next message starts after it.
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
    what it needs.  With ``edges`` every ordered pair of ranks has a communicator of its own.
    """

    name: str
    capacity: int = 0
    overlaps: bool = False
    edges: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.capacity}" if self.capacity > 1 else self.name


BLOCKING = Model("blocking")
STREAM = Model("stream", overlaps=True)
EDGE = Model("edge", overlaps=True, edges=True)


def eager(capacity: int = 1) -> Model:
    """The model with buffered sends: ``capacity`` messages, 1 or more, for each ordered pair of ranks."""
    if capacity < 1:
        raise ModelError("an eager model must buffer at least one message", f"got {capacity}", "use blocking for none")
    return Model("eager", capacity)


EAGER = eager()
MODELS = (BLOCKING, EAGER, EDGE)
"""The models that differ: ``all``."""


def parse_models(text: str) -> tuple[Model, ...]:
    """The models of a text: ``all``, ``blocking``, ``eager``, ``eager:3`` (its capacity), ``edge`` or ``stream``."""
    if text == "all":
        return MODELS
    for model in (*MODELS, STREAM):
        if text == model.name:
            return (model,)
    found = re.fullmatch(r"eager:([0-9]{1,9})", text)
    if re.fullmatch(r"eager:[0-9]{10,}", text):
        raise ModelError(
            "an eager model may buffer at most 999999999 messages", f"got {text[:40]!r}", "name a smaller capacity"
        )
    if found is None:
        fix = nearest(text, ["all", *(model.name for model in MODELS), STREAM.name], "name one")
        raise ModelError("a model must be all, blocking, eager, eager:CAPACITY, edge or stream", f"got {text!r}", fix)
    return (eager(int(found.group(1))),)
