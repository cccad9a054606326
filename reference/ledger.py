"""Measures live activations: what autograd has saved, and what waits for W, by rank and microbatch.

Autograd is asked through its saved-tensor hooks (``torch.autograd.graph.saved_tensors_hooks``): what a forward
saves is packed into a ``Holder``, and the bytes are given back when the holder dies, so that nothing is assumed
about when autograd lets go.  The tensors kept for W are held the same way.  Not counted: parameters and
buffers, messages under way, and an output that nothing has saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dualpipe.schedule import Kind, Lane, Op


class Key(NamedTuple):
    """Whose activations they are."""

    lane: Lane
    stage: int
    mb: int

    @classmethod
    def of(cls, op: Op) -> Key:
        return cls(op.lane, op.stage, op.mb)


class Footprint(NamedTuple):
    """Bytes that one microbatch holds at a stage: from the end of F, and from the end of B until W is over."""

    waiting_for_b: int
    waiting_for_w: int


@dataclass(frozen=True)
class Peak:
    """The most that a rank held at once.

    ``microbatches`` and ``bytes`` are over every instant; ``settled_bytes`` only over the instants between two
    ops, which is what can be told from footprints: while B runs, part of what it frees and part of what it
    leaves behind for W exist side by side.
    """

    microbatches: int = 0
    bytes: int = 0
    settled_bytes: int = 0


class Pool:
    """Storages that are alive, each counted once however many holders share it."""

    def __init__(self) -> None:
        self._holders: Counter[int] = Counter()
        self.bytes = 0

    def __bool__(self) -> bool:
        return bool(self._holders)

    def take(self, storage: int, size: int) -> None:
        self.bytes += 0 if storage in self._holders else size
        self._holders[storage] += 1

    def give_back(self, storage: int, size: int) -> None:
        self._holders[storage] -= 1
        if not self._holders[storage]:
            del self._holders[storage]
            self.bytes -= size


class Account:
    """The live activations of one rank."""

    def __init__(self) -> None:
        self.peak = Peak()
        self.footprints: dict[tuple[Lane, int], Footprint] = {}
        self._whole = Pool()
        self._of: dict[Key, Pool] = {}

    @property
    def live(self) -> Set[Key]:
        """The microbatches that hold something now."""
        return self._of.keys()

    def saving(self, key: Key, owned: Set[int]) -> AbstractContextManager[None]:
        """Count what autograd saves in this context to ``key``, except the storages (by address) in ``owned``."""

        def pack(tensor: Tensor) -> Tensor | Holder:
            # Detached: an op that saves its own output would otherwise keep itself alive through it.
            kept = tensor.detach()
            return kept if kept.untyped_storage().data_ptr() in owned else Holder(self, key, kept)

        def unpack(packed: Tensor | Holder) -> Tensor:
            return packed.tensor if isinstance(packed, Holder) else packed

        return saved_tensors_hooks(pack, unpack)

    def settle(self, op: Op) -> None:
        """Take note of the moment at which a compute op is over."""
        key, place = Key.of(op), (op.lane, op.stage)
        held = self._of[key].bytes if key in self._of else 0
        before = self.footprints.get(place, Footprint(0, 0))
        if op.kind is Kind.F:
            self.footprints[place] = before._replace(waiting_for_b=max(before.waiting_for_b, held))
        elif op.kind is Kind.B:
            self.footprints[place] = before._replace(waiting_for_w=max(before.waiting_for_w, held))
        settled = max(self.peak.settled_bytes, self._whole.bytes)
        self.peak = Peak(self.peak.microbatches, self.peak.bytes, settled)

    def take(self, key: Key, storage: int, size: int) -> None:
        for pool in (self._whole, self._of.setdefault(key, Pool())):
            pool.take(storage, size)
        peak = self.peak
        if len(self._of) > peak.microbatches or self._whole.bytes > peak.bytes:
            microbatches, most = max(peak.microbatches, len(self._of)), max(peak.bytes, self._whole.bytes)
            self.peak = Peak(microbatches, most, peak.settled_bytes)

    def give_back(self, key: Key, storage: int, size: int) -> None:
        for pool in (self._whole, self._of[key]):
            pool.give_back(storage, size)
        if not self._of[key]:
            del self._of[key]


class Holder:
    """A tensor that is live for as long as this object is."""

    def __init__(self, account: Account, key: Key, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # The address names the storage: it cannot be given to another while this tensor keeps it.
        self._entry = key, storage.data_ptr(), storage.nbytes()
        self._account, self.tensor = account, tensor
        account.take(*self._entry)

    def __del__(self) -> None:
        self._account.give_back(*self._entry)


class Ledger:
    """One account for each of ``ranks`` ranks; hand it to ``reference.fake.train`` and read it afterwards."""

    def __init__(self, ranks: int) -> None:
        self.accounts = tuple(Account() for _ in range(ranks))

    @property
    def peaks(self) -> tuple[Peak, ...]:
        return tuple(account.peak for account in self.accounts)

    @property
    def footprints(self) -> Mapping[tuple[Lane, int], Footprint]:
        """By lane and stage."""
        return {place: found for account in self.accounts for place, found in account.footprints.items()}
