"""Measure live activations by rank and microbatch: tensors that autograd has saved, and tensors kept for W.

A hook (``torch.autograd.graph.saved_tensors_hooks``) packs each tensor that a forward saves into a ``Holder``.  Its
bytes are released when the holder is freed, so nothing is assumed about when autograd frees a tensor.  Tensors kept for
W are held the same way.  Not counted: parameters and buffers, messages in flight, and outputs that nothing has saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dualpipe.schedule import Chunk, Kind, Op, Task


class Footprint(NamedTuple):
    """Bytes that one microbatch holds at a chunk: from the end of F to B, and from the end of B to the end of W."""

    waiting_for_b: int
    waiting_for_w: int


@dataclass(frozen=True)
class Peak:
    """The most that a rank held at once.

    ``microbatches`` and ``bytes`` are maxima over all instants, ``settled_bytes`` over the instants between two ops.
    Only the latter follows from footprints: while B runs, part of what it frees and part of what it keeps for W
    coexist.
    """

    microbatches: int = 0
    bytes: int = 0
    settled_bytes: int = 0


class Pool:
    """Live storages, each counted once, no matter how many holders share it."""

    def __init__(self) -> None:
        self._holders: Counter[int] = Counter()
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._holders)

    def take(self, storage: int, size: int) -> None:
        self.bytes += 0 if storage in self._holders else size
        self._holders[storage] += 1

    def release(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self.bytes -= size


class Account:
    """The live activations of one rank."""

    def __init__(self) -> None:
        self.peak = Peak()
        self.footprints: dict[Chunk, Footprint] = {}
        self._whole = Pool()
        self._of: dict[Task, Pool] = {}

    @property
    def live(self) -> Set[Task]:
        """The tasks that hold something now."""
        return self._of.keys()

    def saving(self, task: Task, owned: Set[int]) -> AbstractContextManager[None]:
        """Count what autograd saves in this context for ``task``, except the storages (by address) in ``owned``."""

        def pack(tensor: Tensor) -> Tensor | Holder:
            # Detached, because an op that saves its own output would otherwise keep itself alive.
            kept = tensor.detach()
            return kept if kept.untyped_storage().data_ptr() in owned else Holder(self, task, kept)

        def unpack(packed: Tensor | Holder) -> Tensor:
            return packed.tensor if isinstance(packed, Holder) else packed

        return saved_tensors_hooks(pack, unpack)

    def settle(self, op: Op) -> None:
        """Record the state after a compute op."""
        held = self._of[op.task].bytes if op.task in self._of else 0
        before = self.footprints.get(op.chunk, Footprint(0, 0))
        if op.kind is Kind.F:
            self.footprints[op.chunk] = before._replace(waiting_for_b=max(before.waiting_for_b, held))
        elif op.kind is Kind.B:
            self.footprints[op.chunk] = before._replace(waiting_for_w=max(before.waiting_for_w, held))
        settled = max(self.peak.settled_bytes, self._whole.bytes)
        self.peak = Peak(self.peak.microbatches, self.peak.bytes, settled)

    def take(self, task: Task, storage: int, size: int) -> None:
        for pool in (self._whole, self._of.setdefault(task, Pool())):
            pool.take(storage, size)
        peak = self.peak
        if len(self._of) > peak.microbatches or self._whole.bytes > peak.bytes:
            microbatches, most = max(peak.microbatches, len(self._of)), max(peak.bytes, self._whole.bytes)
            self.peak = Peak(microbatches, most, peak.settled_bytes)

    def release(self, task: Task, storage: int, size: int) -> None:
        for pool in (self._whole, self._of[task]):
            pool.release(storage, size)
        if not self._of[task]:
            del self._of[task]


class Holder:
    """Counts a tensor as live for as long as this object exists."""

    def __init__(self, account: Account, task: Task, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # The address identifies the storage: no other storage can have it while this tensor is alive.
        self._entry = task, storage.data_ptr(), storage.nbytes()
        self._account, self.tensor = account, tensor
        account.take(*self._entry)

    def __del__(self) -> None:
        self._account.release(*self._entry)


class Ledger:
    """One account for each of ``ranks`` ranks; pass it to ``reference.fake.train`` and read it afterwards."""

    def __init__(self, ranks: int) -> None:
        self.accounts = tuple(Account() for _ in range(ranks))

    @property
    def peaks(self) -> tuple[Peak, ...]:
        return tuple(account.peak for account in self.accounts)

    @property
    def footprints(self) -> Mapping[Chunk, Footprint]:
        """The largest footprint of a microbatch at each chunk."""
        return {chunk: found for account in self.accounts for chunk, found in account.footprints.items()}
