"""A transport over gloo that completes messages in the order that a model of communication allows, and in no other.

Each communicator of the model has a queue and a thread, which issues one entry and waits for it before the next one::

    model     queues                            an entry      the rank waits
    blocking  one                               message slot  for each slot (``Pipeline(blocking=True)``)
    eager(c)  one for each peer and direction   message       likewise; for a send it waits for the one c before
    stream    one                               message slot  at a compute, for the slot that brings what it needs
    edge      one for each peer and direction   message       at a compute, for the receive that it needs

gloo completes a send once its receive has been posted, as the models have it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from dualpipe.runtime.transport import Message, MessageError
from proofs.models import Model


class Posted:
    """A message in a queue: its tensors, and whether it has completed."""

    def __init__(self, message: Message) -> None:
        self.message = message
        if message.sends:
            self.tensors = [tensor.detach().contiguous() for tensor in message.tensors]
        else:
            self.tensors = [torch.empty(spec.shape, dtype=spec.dtype) for spec in message.specs]
        self.completed = threading.Event()


class QueueTransport:
    """A transport for ``dualpipe.pipeline.Pipeline`` on the default process group, which must be of gloo."""

    def __init__(self, model: Model, timeout: float) -> None:
        self.model, self.timeout = model, timeout
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._one = not (model.edges or model.capacity)
        self._queues: dict[object, queue.SimpleQueue[list[Posted]]] = {}
        self._posted: dict[int, Posted] = {}
        self._sends: defaultdict[int, list[Posted]] = defaultdict(list)

    def post(self, messages: Sequence[Message]) -> None:
        entries = [Posted(message) for message in messages]
        for entry in entries:
            self._posted[id(entry.message)] = entry
            if entry.message.sends:
                self._sends[entry.message.peer].append(entry)
        if self._one:
            self._put("all", entries)
            return
        for entry in entries:
            self._put((entry.message.peer, entry.message.sends), [entry])

    def _put(self, key: object, entries: list[Posted]) -> None:
        if key not in self._queues:
            self._queues[key] = queue.SimpleQueue()
            threading.Thread(target=self._work, args=(self._queues[key],), daemon=True).start()
        self._queues[key].put(entries)

    def _work(self, own: queue.SimpleQueue[list[Posted]]) -> None:
        """Complete one entry after the other, until one fails."""
        while True:
            entries = own.get()
            works = []
            try:
                for entry in entries:
                    issue = dist.isend if entry.message.sends else dist.irecv
                    works += [issue(tensor, entry.message.peer) for tensor in entry.tensors]
                for work in works:
                    work.wait()
            except RuntimeError:  # a peer has ended; the rank notices that this entry does not complete
                return
            for entry in entries:
                entry.completed.set()

    def wait(self, message: Message) -> Sequence[Tensor]:
        posted = awaited = self._posted[id(message)]
        if message.sends and self.model.capacity:
            sends = self._sends[message.peer]
            room = sends.index(posted) - self.model.capacity
            if room < 0:
                return ()
            awaited = sends[room]
        self._await(awaited)
        return () if message.sends else posted.tensors

    def _await(self, posted: Posted) -> None:
        started = time.monotonic()
        if not posted.completed.wait(self.timeout):
            raise MessageError(posted.message, time.monotonic() - started, None)
        posted.message.completed = True

    def drain(self) -> None:
        for posted in self._posted.values():
            self._await(posted)
        self._posted.clear()
        self._sends.clear()

    def agree(self, record: Mapping[str, str]) -> None:
        """All ranks are forked from one process with one case, so there is nothing to compare."""

    @contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """The ranks do not announce their errors: a rank ends at its timeout."""
        yield

    def close(self) -> None:
        """The threads end with the process."""
