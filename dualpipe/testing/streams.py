"""Stand-ins for GPU streams that run on the CPU and find missing waits between streams without a GPU.

On a GPU two streams run at the same time, unless one waits for the other.  If a program lacks a wait, it sometimes
reads a tensor before that is written; on the CPU it never does.  Within ``checked_streams`` each operator belongs to
the current stream, and ``StreamError`` is raised for

    a read     of a tensor that another stream has written, without a wait for that write,
    a write    to a tensor that another stream has read or written, without a wait for that access.

Every stream has a vector clock (Mattern, "Virtual Time and Global States of Distributed Systems", 1989): how much of
each other stream is known to have ended.  ``wait_stream``, ``wait_event`` and ``Event.wait`` extend the clock of a
stream.  ``synchronize`` and ``item`` extend the clock of the host, and new work on any stream comes after that.
Allocating counts as writing, because the caching allocator orders memory only within its stream.

Not checked are tensors that are freed while another stream uses them (``record_stream``), writes through ``.data_ptr``
or numpy, and the streams of asynchronous collectives: these count as work of the stream that is current when they are
called.  A backward, too, belongs to the stream that is current when it is called; on a GPU each of its operators runs
on the stream of its forward.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dualpipe.errors import RuleError
from dualpipe.record.child import streams as plain

Clock = dict["Stream", int]

_reductions: Any = reductions
_TORCH = (str(Path(torch.__file__).parent), __file__)
_IN_PLACE_ONLY = ("allreduce_", "broadcast_")
"""Collectives whose first argument is read as well as written."""


class StreamError(RuleError):
    """An access that is not ordered after an earlier one on another stream."""


class Stream(plain.Stream):
    """A stream that keeps a vector clock of its waits."""

    def __init__(self, device: Any = None, priority: int = 0, **more: Any) -> None:
        super().__init__(device, priority, **more)
        streams = _checker().streams
        streams.append(self)
        self.name = "the first stream" if len(streams) == 1 else f"stream {len(streams)}"
        self.clock: Clock = {}

    def work(self) -> int:
        """Issue one operator; returns its number on this stream."""
        _extend(self.clock, _checker().host)
        self.clock[self] = self.clock.get(self, 0) + 1
        return self.clock[self]

    def record_event(self, event: Any = None) -> Any:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Any) -> None:
        _extend(self.clock, event.clock)

    def wait_stream(self, stream: Any) -> None:
        _extend(self.clock, stream.clock)

    def synchronize(self) -> None:
        _extend(_checker().host, self.clock)


class Event(plain.Event):
    """An event with the clock of the stream at the time at which it was recorded; empty before that."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.clock: Clock = {}

    def record(self, stream: Any = None) -> None:
        super().record(stream)
        issued: Any = stream or plain.CURRENT[0]
        self.clock = dict(issued.clock)

    def wait(self, stream: Any = None) -> None:
        (stream or plain.CURRENT[0]).wait_event(self)

    def synchronize(self) -> None:
        _extend(_checker().host, self.clock)


@dataclass(frozen=True)
class Access:
    """One operator's access to a tensor: its stream, its number there, and its line in the program."""

    operator: str
    stream: Stream
    number: int
    line: str

    def before(self, stream: Stream) -> bool:
        """Whether this access has ended when the next operator of ``stream`` begins."""
        return self.stream is stream or stream.clock.get(self.stream, 0) >= self.number


@dataclass
class _Memory:
    """The last accesses to a storage."""

    alive: Any
    """A ``StorageWeakRef``, which torch has not typed."""
    written: Access | None = None
    read: dict[Stream, Access] = field(default_factory=dict)


class Checker(TorchDispatchMode):  # type: ignore[no-untyped-call] # __init_subclass__ of torch's class
    """Keeps the accesses to every storage.  ``operators`` counts the operators that were checked, ``waited`` the
    accesses that a wait orders after one on another stream."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's
        self.host: Clock = {}
        self.streams: list[Stream] = []
        self.operators = self.waited = 0
        self._memory: dict[int, _Memory] = {}
        self._kept = 1000

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        self.operators += 1
        inputs, written = _accesses(func, args, kwargs or {})
        used = {_key(tensor) for tensor in _tensors((args, kwargs))}
        fresh = [tensor for tensor in _tensors(returned) if _key(tensor) not in used]
        if not (written or fresh) and _tensors(returned):  # only views, whose data is not touched
            return returned
        stream: Stream = plain.CURRENT[0]  # type: ignore[assignment] # checked_streams has put one of ours there
        access = Access(str(func), stream, stream.work(), _line(sys._getframe(1)))
        for tensor in inputs:
            self.read(tensor, access)
        for tensor in (*written, *fresh):
            self.write(tensor, access)
        if func is torch.ops.aten._local_scalar_dense.default:  # item() waits for the stream
            stream.synchronize()
        return returned

    def read(self, tensor: Tensor, access: Access) -> None:
        memory = self._of(tensor)
        self.require(tensor, access, "reads", memory.written, "wrote")
        memory.read[access.stream] = access

    def write(self, tensor: Tensor, access: Access) -> None:
        memory = self._of(tensor)
        self.require(tensor, access, "writes", memory.written, "wrote")
        for earlier in memory.read.values():
            self.require(tensor, access, "writes", earlier, "read")
        memory.written, memory.read = access, {}

    def require(self, tensor: Tensor, access: Access, does: str, earlier: Access | None, did: str) -> None:
        if earlier is None or earlier.stream is access.stream:
            return
        if not earlier.before(access.stream):
            raise StreamError(
                "a stream must wait for work of another stream before it uses the same tensor",
                f"{access.operator} at {access.line} on {access.stream.name} {does} a tensor of shape "
                f"{list(tensor.shape)} that {earlier.operator} at {earlier.line} on {earlier.stream.name} {did}, with "
                "no wait between them",
                "call wait_stream, or record an event there and wait for it here",
            )
        self.waited += 1

    def _of(self, tensor: Tensor) -> _Memory:
        key = _key(tensor)
        memory = self._memory.get(key)
        if memory is None or memory.alive.expired():  # another storage at the same address
            memory = self._memory[key] = _Memory(_reductions.StorageWeakRef(tensor.untyped_storage()))
        if len(self._memory) > self._kept:
            self._memory = {key: each for key, each in self._memory.items() if not each.alive.expired()}
            self._kept = 2 * len(self._memory) + 1000
        return memory


_ACTIVE: list[Checker] = []


@contextlib.contextmanager
def checked_streams() -> Iterator[Checker]:
    """Within the block, put checked streams and events in place of those of ``torch.cuda``.

    For programs that compute on the CPU.  Raises ``StreamError`` at the operator whose access is not ordered, and
    ``RuleError`` within another such block.
    """
    if _ACTIVE:
        raise RuleError(
            "streams are checked by one block at a time", "checked_streams is nested", "leave the inner one out"
        )
    checker = Checker()
    _ACTIVE.append(checker)
    first = Stream()
    outside, plain.CURRENT[0] = plain.CURRENT[0], first
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, stand_in in _stand_ins(first):
                stack.enter_context(_replaced(owner, name, stand_in))
            with checker:
                yield checker
    finally:
        plain.CURRENT[0] = outside
        _ACTIVE.pop()


def _checker() -> Checker:
    if not _ACTIVE:
        raise RuleError("a checked stream is for the block of checked_streams", "it is used outside", "enter one")
    return _ACTIVE[0]


def _stand_ins(first: Stream) -> Iterator[tuple[Any, str, Any]]:
    def synchronize(device: Any = None) -> None:
        for stream in _checker().streams:
            stream.synchronize()

    yield torch.cuda, "Stream", Stream
    yield torch.cuda, "Event", Event
    yield torch.cuda, "current_stream", lambda device=None: plain.CURRENT[0]
    yield torch.cuda, "default_stream", lambda device=None: first
    yield torch.cuda, "stream", plain.Context
    yield torch.cuda, "set_stream", lambda stream: plain.CURRENT.__setitem__(0, stream)
    yield torch.cuda, "synchronize", synchronize
    yield torch.Tensor, "record_stream", lambda self, stream: None
    yield torch.cuda.nvtx, "range_push", lambda message: 0
    yield torch.cuda.nvtx, "range_pop", lambda: 0
    yield torch.cuda.nvtx, "range", lambda message, *args, **options: contextlib.nullcontext()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own, before = name in vars(owner), getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _extend(clock: Clock, other: Clock) -> None:
    for stream, number in list(other.items()):
        clock[stream] = max(clock.get(stream, 0), number)


def _accesses(func: Any, args: Sequence[Any], kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operator reads, and those of its arguments that it writes."""
    if func.namespace == "c10d":  # its schemas do not tell which arguments are written
        name = func._schema.name.partition("::")[2]
        first, rest = _tensors(args[:1]), _tensors((args[1:], kwargs))
        if name == "send":
            return first, []
        return [*rest, *(first if name in _IN_PLACE_ONLY else ())], first
    if func._schema.name.removeprefix("aten::").startswith("new_") or func._schema.name.endswith("_like"):
        return [], []  # only the shape of the argument counts
    inputs: list[Tensor] = []
    written: list[Tensor] = []
    schema = func._schema.arguments
    named = [*zip(schema, args, strict=False), *((a, kwargs[a.name]) for a in schema if a.name in kwargs)]
    for argument, value in named:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if not (writes and argument.is_out):
            inputs += _tensors(value)
        if writes:
            written += _tensors(value)
    return inputs, written


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.layout is torch.strided]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _line(frame: FrameType | None) -> str:
    """The innermost line that is neither torch's nor ours."""
    while frame is not None and frame.f_code.co_filename.startswith(_TORCH):
        frame = frame.f_back
    return "an unknown line" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
