"""What the log of a rank has: its forwards, its messages, its collectives, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dualpipe.errors import RuleError

Event = Mapping[str, Any]


class RecordError(RuleError):
    """A program that cannot be written as a schedule: what could not be named, and where in the program it is."""


class ForwardId(NamedTuple):
    """A forward, and with it the backward and the weight gradient of the same task: the rank and its own count."""

    rank: int
    number: int


class MessageId(NamedTuple):
    """A message end: the rank and its own count of messages."""

    rank: int
    number: int


class ModuleId(NamedTuple):
    """A module that a rank calls: the rank and its own count of modules."""

    rank: int
    number: int


class CollectiveId(NamedTuple):
    """A collective of a rank: the rank and its own count of collectives."""

    rank: int
    number: int


class Collective(NamedTuple):
    """A collective as one member called it.

    Attributes
    ----------
    group, group_name:
        The members, and the name of the communicator.
    form:
        The types and shapes of its tensors, if all members give the same.
    modules, names:
        The modules that hold the parameters whose gradients it is on, and the names of these.
    values:
        Digests of the values of these parameters; empty for a parameter whose elements are all equal.
    carries:
        Whether a forward or a backward made one of its tensors.
    context:
        The forwards in whose computation it was called.
    within:
        Whether a forward, a backward or a message of its training step precedes it.
    outputs:
        The forwards from whose results its tensors are made, as losses are.
    """

    id: CollectiveId
    name: str
    group: tuple[int, ...]
    group_name: str
    form: tuple[str, ...]
    modules: tuple[int, ...]
    names: tuple[str, ...]
    carries: bool
    context: tuple[int, ...]
    at: str
    step: int
    within: bool
    values: tuple[str, ...] = ()
    outputs: tuple[int, ...] = ()


class Arrival(NamedTuple):
    """A tensor from outside of torch's operators: its origin, and the collective that gave it, if one did."""

    how: str
    collective: int | None


class Owed(NamedTuple):
    """A parameter without a gradient: its name, how the backward left it out, and the line of the program."""

    name: str
    how: str
    at: str


class Taken(NamedTuple):
    """A forward, or its backward, that takes the tensor of an arrival, with the line and the training step."""

    forward: int
    arrival: int
    at: str
    step: int
    backward: bool


@dataclass
class Forward:
    """A forward as its rank observed it.

    Attributes
    ----------
    module, at, step:
        The first module called, the line of the program, and the number of optimizer steps before it.
    messages, after:
        The receives and the forwards on the same rank whose tensors it takes.
    gradients:
        The receives whose tensors are the gradient of its output.
    weights:
        Whether it changed a weight gradient.
    backward_began:
        Whether its backward began.
    grad:
        Whether it began with gradients enabled.
    requested_at:
        Where the program requested gradients of weights from the engine; it may keep them elsewhere than in ``.grad``.
    untrainable:
        Whether none of its modules has a parameter to train.
    sharded:
        Whether its weights are sharded over ranks, so that their gradients are not observed.
    owed:
        The parameters whose gradients its backward left out, by number: the name, how it did so (``none``, ``unseen``,
        ``zero``, ``all zero``) and where.
    fed:
        Those that the engine did not reach, but that the program gave a gradient during the backward.
    paid:
        Those of ``owed`` that got a gradient later in the step; ``paid_at`` is where others got one in a later step.
    """

    id: ForwardId
    module: int
    at: str
    messages: list[MessageId] = field(default_factory=list)
    after: list[ForwardId] = field(default_factory=list)
    gradients: list[MessageId] = field(default_factory=list)
    weights: bool = False
    backward_began: bool = False
    grad: bool = True
    requested_at: str = ""
    untrainable: bool = False
    sharded: bool = False
    step: int = 0
    owed: dict[int, Owed] = field(default_factory=dict)
    fed: set[int] = field(default_factory=set)
    paid: set[int] = field(default_factory=set)
    paid_at: str = ""


@dataclass
class Message:
    """One end of a message.

    ``memory`` is the storage and the offset of the tensor, or ``None`` if unknown.  Four fields are for sends only:
    ``gradient_of`` and ``activation_of`` are the forwards to which the tensor belongs, ``weights`` the parameters whose
    gradients it has, ``passed_on`` the receives whose tensor it is.
    """

    id: MessageId
    send: bool
    peer: int
    channel: tuple[Any, ...]
    group: str
    gradient_of: list[ForwardId]
    activation_of: list[ForwardId]
    form: str
    at: str
    step: int
    completed: bool = False
    tag: int = 0
    memory: tuple[int, int] | None = None
    weights: tuple[str, ...] = ()
    passed_on: tuple[MessageId, ...] = ()


class Doubt(NamedTuple):
    """Something about a forward that a schedule cannot express; ``what`` is the kind, see ``notes``."""

    what: str
    forward: int
    at: str
    step: int


class Raised(NamedTuple):
    """The error that ended a rank.

    ``at`` is the line of the program and ``time`` in seconds since the epoch.  ``during`` is what the error left: a
    forward (F), a backward (B) or a wait for messages (M), and its numbers; or else the messages (R) of a tensor that
    requires no gradient.  ``freed`` is where the program had freed the output of that backward, or empty.
    """

    error: str
    text: str
    at: str
    time: float
    during: tuple[str, list[int]] | None
    freed: str = ""


@dataclass
class RankLog:
    """The events of one rank, and the modules, forwards, messages and collectives in them.

    Attributes
    ----------
    same:
        Maps a forward to the one that it turned out to be a part of; ``find`` resolves it.
    raised:
        The error that ended the rank.
    waiting, collecting:
        The messages, and the collective, that it was waiting for at the end; ``polling`` is whether it only looked.
    arrivals, taken, left:
        Tensors from outside of torch's operators, the forwards that took them, and the ways in which activations left
        torch.
    changed:
        What the program did to gradients in place: the operator, the line and the training step.
    discarded:
        The training steps whose gradients it threw away before an optimizer's step, and where.
    """

    rank: int
    events: list[Event]
    forwards: dict[int, Forward]
    messages: dict[int, Message]
    modules: dict[int, tuple[str, frozenset[int]]]
    ended: bool
    steps: int
    same: dict[int, int]
    doubts: list[Doubt] = field(default_factory=list)
    raised: Raised | None = None
    waiting: list[int] = field(default_factory=list)
    collectives: dict[int, Collective] = field(default_factory=dict)
    collecting: int | None = None
    polling: bool = False
    arrivals: dict[int, Arrival] = field(default_factory=dict)
    taken: list[Taken] = field(default_factory=list)
    left: set[str] = field(default_factory=set)
    changed: list[tuple[str, str, int]] = field(default_factory=list)
    discarded: dict[int, str] = field(default_factory=dict)

    def find(self, forward: int) -> int:
        while forward in self.same:
            forward = self.same[forward]
        return forward
