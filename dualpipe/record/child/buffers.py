"""The memory of messages: who touches it while a message is in flight, and which received tensors a graph needs.

NCCL reads a sent tensor, and writes a received one, at any time between the post and the wait.  So the program may not
read a tensor that is being received, nor write, free or resize one that is being sent.  With gloo such a message often
arrives correctly all the same, or not at all.  Under the recorder a send copies the values when it is posted, and a
receive keeps its memory until the wait, so the run does not depend on the time at which gloo moves the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from .freed import Freed
from .log import call_path
from .marks import Marks
from .regions import Region, is_readable, region_of, weak_storage

Write = Callable[..., None]
Entry = TypeVar("Entry")
_RESIZES = ("aten::resize_", "aten::set_")
_WALKED = "dualpipe.record.walked"  # in a graph node's metadata: its saved tensors have been read


class Flight(NamedTuple):
    """A message in flight: its tensor, what is held for it, and the accesses that were written down.

    ``noted`` has their kinds, and whether each was another message's.
    """

    send: bool
    region: Region
    tensor: Tensor
    held: Tensor
    noted: set[tuple[str, bool]]


class Buffers:
    """The messages in flight of one rank, and the memory of those that it has received.

    Threads of the program that wait for messages call ``completed`` while its main thread computes, so every loop goes
    over a copy of the entries (``_now``), and an entry may be gone by the time it is removed.
    """

    def __init__(self, write: Write, freed: Freed) -> None:
        self._write, self._freed = write, freed
        self._flights: dict[int, Flight] = {}
        self._received: dict[int, tuple[Any, Region]] = {}  # message -> its storage (weak), and its memory
        self._kept: set[int] = set()  # messages whose memory a graph needs, or needed
        self._hooked: set[int] = set()  # messages that were read while saved tensors were packed by hooks

    # messages

    def hold(self, send: bool, tensor: Tensor) -> Tensor:
        """The tensor to post in place of the program's."""
        with no_dispatch():
            return tensor.detach().clone() if send and is_readable(tensor) else tensor.detach()

    def posted(self, number: int, send: bool, tensor: Tensor, held: Tensor, by: Marks | None) -> None:
        """A message has been posted.  A receive into memory in use writes to it, a send from it reads it."""
        region = region_of(tensor)
        if region is None:
            return
        self._touch(region, "read" if send else "write", number, by)
        if not send:
            for other, (_, received) in _now(self._received):
                if not received.overlaps(region):
                    continue
                if other in self._kept:
                    self._write("access", what="write", message=other, posted=number, by=[], at=call_path())
                self._received.pop(other, None)
        self._flights[number] = flight = Flight(send, region, tensor, held, set())
        if send and self._freed.held(tensor):  # since the program has put it into a batch
            self._note(number, flight, "free", None, by, self._freed.at([tensor]))

    def completed(self, numbers: Iterable[int]) -> None:
        """The program has waited for these messages."""
        for number in numbers:
            flight = self._flights.pop(number, None)
            if flight is not None and not flight.send:
                self._received[number] = weak_storage(flight.held), flight.region
        for number, (storage, _) in _now(self._received):
            if storage.expired():
                self._received.pop(number, None)

    # what the program does to memory

    def operator(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], by: Marks | None) -> None:
        """An operator is about to run."""
        if not (self._flights or self._received) or func.namespace == "c10d":
            return
        regions = [
            (region, writes) for tensor, writes in _accesses(func, args, kwargs) if (region := region_of(tensor))
        ]
        for region, _ in regions if _packed_by_hooks() else ():
            self._hooked |= {number for number, (_, received) in _now(self._received) if received.overlaps(region)}
        reads = not _only_looks(func)
        for region, writes in regions:
            if writes:
                self._touch(region, "free" if func._schema.name in _RESIZES else "write", None, by)
            elif reads:
                self._touch(region, "read", None, by)

    def replaced(self, tensor: Tensor, value: Any, by: Marks | None) -> None:
        """The program is about to give a tensor the storage of another one, which frees its own."""
        self._freed.replaced(tensor, value)
        for number, flight in _now(self._flights):
            if flight.tensor is tensor:
                self._note(number, flight, "free", None, by)
                if not flight.send:
                    self._freed.passes_on(tensor, value)

    def resized(self, storage: int, by: Marks | None) -> bool:
        """The program is about to resize a storage; returns whether a message in flight uses it."""
        found = [(number, flight) for number, flight in _now(self._flights) if flight.region.storage == storage]
        for number, flight in found:
            self._note(number, flight, "free", None, by)
        return bool(found)

    def _touch(self, region: Region, what: str, posted: int | None, by: Marks | None) -> None:
        for number, flight in _now(self._flights):
            if flight.region.overlaps(region) and not (flight.send and what == "read"):
                self._note(number, flight, what, posted, by)

    def _note(self, number: int, flight: Flight, what: str, posted: int | None, by: Marks | None, at: str = "") -> None:
        kind = what, posted is not None
        if kind not in flight.noted:  # one of each kind is enough to refute, and a forward has many operators
            flight.noted.add(kind)
            self._write("access", what=what, message=number, posted=posted, by=sorted(by or ()), at=at or call_path())

    # graphs

    def called(self, roots: Iterable[Any], forward: int) -> None:
        """A module call has returned: which received tensors its graph needs for the backward."""
        if not self._received:
            return
        found = self._hooked & self._received.keys()
        if not self._hooked:  # looking at a tensor that hooks have packed would unpack it
            saved = {region for node in _new_nodes(roots) for tensor in _saved(node) if (region := region_of(tensor))}
            for number, (_, region) in _now(self._received):
                if any(region.overlaps(other) for other in saved):
                    found.add(number)
        for number in sorted(found - self._kept):
            self._write("keep", message=number, forward=forward)
        self._kept |= found
        self._hooked.clear()


def _now(entries: Mapping[int, Entry]) -> list[tuple[int, Entry]]:
    """The entries at this moment; the copy is made in one step of the interpreter."""
    return list(entries.items())


def _packed_by_hooks() -> bool:
    """Whether the tensors that operators save now are packed by hooks, as activation checkpointing does."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _accesses(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    """The tensors that an operator gets, and whether it writes to them."""
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        for value in given if isinstance(given, (list, tuple)) else (given,):
            if isinstance(value, Tensor):
                yield value, argument.alias_info is not None and argument.alias_info.is_write


def _only_looks(func: Any) -> bool:
    """Whether an operator reads no values: it makes a view or uses shapes."""
    name = func._schema.name.rpartition("::")[2]
    views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return views or name.endswith("_like") or name.startswith("new_")


def _new_nodes(roots: Iterable[Any]) -> Iterator[Any]:
    """The nodes of a graph that were not looked at before."""
    pending = list(roots)
    while pending:
        node = pending.pop()
        if node is not None and _WALKED not in node.metadata:
            node.metadata[_WALKED] = True
            yield node
            pending.extend(following for following, _ in node.next_functions)


_NAMES: dict[type, list[str]] = {}


def _saved(node: Any) -> Iterator[Tensor]:
    """The tensors that a node holds for its backward; none if it was freed."""
    kind = type(node)
    if kind not in _NAMES:
        _NAMES[kind] = [name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors"]
    for name in _NAMES[kind]:
        try:
            values = getattr(node, name)
        except RuntimeError:
            continue
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if isinstance(value, Tensor):
                yield value
    for value in getattr(node, "__dict__", {}).values():  # attributes of the context of a torch.autograd.Function
        if isinstance(value, Tensor):
            yield value
