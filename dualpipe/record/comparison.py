"""How a recorded step compares with a plain run of its modules, as data; ``dualpipe.record.plain`` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dualpipe.schedule import Chunk, Lane


@dataclass(frozen=True)
class ChunkComparison:
    """A stage of a lane.

    ``faults`` says what differs and ``unknown`` what could not be compared, in words; ``notes`` in what way gradients
    agree.  ``summed`` is whether the gradients are the sums over both lanes, ``None`` if that does not show.
    """

    chunk: Chunk
    rank: int
    microbatches: int
    faults: tuple[str, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]
    summed: bool | None = None

    def text(self) -> str:
        found = "; ".join([*self.faults, *self.unknown]) or "outputs and gradients equal"
        return "; ".join([f"{self.chunk} on rank {self.rank}: {found}", *self.notes])

    def as_json(self) -> dict[str, Any]:
        return {
            "lane": str(self.chunk.lane),
            "stage": self.chunk.stage,
            "rank": self.rank,
            "microbatches": self.microbatches,
            "equal": not self.faults and not self.unknown,
            "faults": list(self.faults),
            "unknown": list(self.unknown),
            "notes": list(self.notes),
            "summed": self.summed,
        }


@dataclass(frozen=True)
class LossComparison:
    """The losses of a lane: how many backwards began from them, and how many of them the program kept or read.

    ``seen`` is ``None`` for a program without an optimizer, as its variables are gone when it ends.  ``collected`` is
    whether the program held losses whose backward had run, as a list of them does; a program that never did may have no
    use for its losses.
    """

    lane: Lane
    rank: int
    microbatches: int
    computed: int
    seen: int | None
    collected: bool

    @property
    def faults(self) -> tuple[str, ...]:
        found = []
        if self.computed < self.microbatches:
            found.append(f"only {self.computed} of {self.microbatches} backwards began from a loss")
        if self.seen is not None and self.seen < self.computed and self.collected:
            kept = "none is" if self.seen == 0 else f"only {self.seen} are"
            found.append(
                f"{self.computed} were computed and collected, and {kept} kept or read by the end of the step: is "
                "their list cleared before it is returned, read on another rank, or thrown away?"
            )
        return tuple(found)

    def text(self) -> str:
        seen = "" if self.seen is None else f", {self.seen} of them kept or read by the end of the step"
        found = "; ".join(self.faults) or f"{self.computed} computed{seen}"
        return f"losses of lane {self.lane} on rank {self.rank}: {found}"

    def as_json(self) -> dict[str, Any]:
        return {
            "lane": str(self.lane),
            "rank": self.rank,
            "microbatches": self.microbatches,
            "computed": self.computed,
            "seen": self.seen,
            "faults": list(self.faults),
        }


@dataclass(frozen=True)
class Comparison:
    """A recorded step and its plain run.  ``replicas`` says for each stage on two lanes whether they were summed."""

    chunks: tuple[ChunkComparison, ...]
    losses: tuple[LossComparison, ...]
    replicas: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """``equal``, ``different`` or ``unknown``."""
        if self.replicas or any(each.faults for each in self.chunks) or any(each.faults for each in self.losses):
            return "different"
        return "unknown" if any(each.unknown for each in self.chunks) else "equal"

    def text(self) -> str:
        """A line for each stage and lane, then the losses and the replicas."""
        lines = [f"compared with a plain run of the same modules: {self.verdict}"]
        lines += [f"  {each.text()}" for each in self.chunks]
        lines += [f"  {each.text()}" for each in self.losses]
        return "\n".join([*lines, *(f"  {line}" for line in self.replicas)]) + "\n"

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "chunks": [each.as_json() for each in self.chunks],
            "losses": [each.as_json() for each in self.losses],
            "replicas": list(self.replicas),
        }
