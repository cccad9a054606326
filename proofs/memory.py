"""Live activations, by walking each rank's program: against a bound in microbatches, and in bytes.

A microbatch is live on a rank, at one stage and lane, from its F to the end of its W.  Within a slot, allocations count
before releases.  In bytes, a microbatch takes what its B needs until the end of B, and then what its W needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from dualpipe.errors import RuleError
from dualpipe.schedule import COMPUTE, Kind, Op, Program, Schedule, Slot, Task
from dualpipe.schedule import B as BACKWARD
from dualpipe.schedule import F as FORWARD
from dualpipe.schedule import W as WEIGHT
from proofs.findings import Live, OverBound
from proofs.table import WIDTH, B, F, Row, Table, W, table_of
from proofs.verdict import Proved, Refuted, Skipped, Verdict

T = TypeVar("T")


class BoundError(RuleError):
    """A bound or a size that is not valid."""


@dataclass(frozen=True)
class Bound:
    """The most microbatches that each rank may hold, and the source of that bound."""

    per_rank: tuple[int, ...]
    source: str


def _dualpipe(schedule: Schedule) -> Iterator[int]:
    return (schedule.ranks + 1 for _ in range(schedule.ranks))


def _dualpipev(schedule: Schedule) -> Iterator[int]:
    return (2 * schedule.ranks + 1 for _ in range(schedule.ranks))


def _one_f_one_b(schedule: Schedule) -> Iterator[int]:
    microbatches = max(schedule.microbatches.values())
    route = next(iter(schedule.routes.values()))
    stages = (route.index(rank) if rank in route else rank for rank in range(schedule.ranks))
    return (min(schedule.ranks - stage, microbatches) for stage in stages)


def _zb1p(schedule: Schedule) -> Iterator[int]:
    return (schedule.ranks for _ in range(schedule.ranks))


def _interleaved(schedule: Schedule) -> Iterator[int]:
    return (3 * schedule.ranks - 1 for _ in range(schedule.ranks))


def _zbv(schedule: Schedule) -> Iterator[int]:
    return (2 * schedule.ranks for _ in range(schedule.ranks))


PUBLISHED: Mapping[str, tuple[str, Callable[[Schedule], Iterator[int]]]] = {
    "dualpipe": ("P+1", _dualpipe),
    "dualpipev": ("2P+1", _dualpipev),
    "1f1b": ("min(P-r, M)", _one_f_one_b),
    "zb1p": ("P", _zb1p),
    "interleaved": ("3P-1", _interleaved),
    "zbv": ("2P", _zbv),
}
"""The bounds that were published with the schedules, in live microbatches of a rank::

    dualpipe, dualpipev   DeepSeek's README; the latter has 2P stages on P ranks
    1f1b                  arXiv 2104.04473
    zb1p (ZB-H1), zbv     arXiv 2401.10241: the memory of 1F1B; at one of ZBV's 2P stages a microbatch counts as half
    interleaved           arXiv 2205.05198: 1 + (P-1)/(2P) times the memory of 1F1B, which is 2P of such halves

Late W keeps the bound of its schedule."""


def bound_of(schedule: Schedule, max_activations: int | None = None) -> Bound | None:
    """The bound given, else the published one for the schedule's name; only the name decides which."""
    if max_activations is not None:
        if max_activations < 0:
            raise BoundError("a bound on activations must be 0 or more", f"got {max_activations}", "give a count")
        return Bound((max_activations,) * schedule.ranks, "given")
    name = schedule.name.partition("-late-")[0]
    if name not in PUBLISHED:
        return None
    formula, per_rank = PUBLISHED[name]
    return Bound(tuple(per_rank(schedule)), f"{formula}, published for {name}")


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """For each rank the most microbatches that it holds at once."""
    return _peaks(table_of(schedule))


def within(schedule: Schedule, bound: Bound | None) -> Verdict:
    """Whether each rank stays within its bound; the finding is the first slot, of any rank, that does not."""
    if bound is None:
        return Skipped("no bound was given and the schedule's name has no published one: the peak is only reported")
    table = table_of(schedule)
    over = [
        (slot, rank, dict(live))
        for rank, (most, peak) in enumerate(zip(bound.per_rank, _peaks(table), strict=True))
        if peak > most
        for slot, live in islice((each for each in _walk(table.row(rank)) if len(each[1]) > most), 1)
    ]
    if not over:
        return Proved()
    slot, rank, tasks = min(over, key=lambda found: found[:2])
    live = tuple(Live(table.op(key + F, mb), until) for (key, mb), until in tasks.items())
    return Refuted(OverBound(rank, slot, live, bound.per_rank[rank], bound.source))


def _peaks(table: Table) -> tuple[int, ...]:
    if "peaks" not in table.derived:
        table.derived["peaks"] = tuple(max((len(live) for _, live in _walk(row)), default=0) for _, row in table.rows())
    peaks: tuple[int, ...] = table.derived["peaks"]
    return peaks


def _walk(row: Row) -> Iterator[tuple[int, dict[tuple[int, int], Kind]]]:
    """For each slot with forwards its number, and what is live in it: a chunk's first key, and the microbatch."""
    live: dict[tuple[int, int], Kind] = {}
    done: list[tuple[int, int, int]] = []
    ends, slot, end, grows = row.ends, 0, row.ends[0] if row.ends else 0, False
    for number, (key, mb) in enumerate(zip(row.keys, row.mbs, strict=True), 1):
        kind = key % WIDTH
        if kind == F:
            live.setdefault((key - F, mb), BACKWARD)
            grows = True
        elif kind in (B, W):
            done.append((kind, key - kind, mb))
        if number == end:
            if grows:
                yield slot, live
                grows = False
            for kind, chunk, mb in done:
                if kind == W:
                    live.pop((chunk, mb), None)
                elif (chunk, mb) in live:
                    live[chunk, mb] = WEIGHT
            done.clear()
            slot += 1
            end = ends[slot] if slot < len(ends) else 0


def full_backwards(slot: Iterable[tuple[Kind, T]]) -> set[T]:
    """The names whose B and W are both in a slot, which is a full backward.

    The slot is given by kinds and names; a name is a task (of a schedule) or a chunk (of a phase table).
    """
    ops = tuple(slot)
    return {name for kind, name in ops if kind is BACKWARD} & {name for kind, name in ops if kind is WEIGHT}


@dataclass(frozen=True)
class Held:
    """The bytes of one microbatch at one stage, while it waits for its B or its W."""

    what: Live
    size: int


@dataclass(frozen=True)
class PeakBytes:
    """The most bytes that a rank holds, the first slot in which it does (``None`` if it never holds any), and what is
    live then."""

    rank: int
    total: int
    slot: int | None
    held: tuple[Held, ...]

    def as_json(self) -> dict[str, Any]:
        live = [{"op": str(held.what.op), "until": str(held.what.until), "bytes": held.size} for held in self.held]
        return {"rank": self.rank, "bytes": self.total, "slot": self.slot, "live": live}


def peak_bytes(schedule: Schedule, waiting_for_b: Sequence[int], waiting_for_w: Sequence[int]) -> tuple[PeakBytes, ...]:
    """The peak of each rank in bytes.

    A microbatch holds ``waiting_for_b[stage]`` bytes from its F to the end of its B (the saved activations) and
    ``waiting_for_w[stage]`` bytes from its B to the end of its W (inputs and output gradients of the linear layers).
    During a B whose W is deferred it holds both, since allocations count before releases.  A full backward (B and W
    in one slot) holds nothing for W.  Raises ``BoundError`` unless both sequences give every stage a size of 0 or more.
    """
    _require_sizes(schedule, waiting_for_b, waiting_for_w)
    return tuple(_peak_bytes(schedule, rank, waiting_for_b, waiting_for_w) for rank in range(schedule.ranks))


def settled_bytes(schedule: Schedule, waiting_for_b: Sequence[int], waiting_for_w: Sequence[int]) -> tuple[int, ...]:
    """For each rank the most bytes that it holds *between* two ops, run one at a time, which can be measured exactly.

    Here every B leaves bytes to its W, even in the same slot.  Sizes and errors are those of ``peak_bytes``.
    """
    _require_sizes(schedule, waiting_for_b, waiting_for_w)
    return tuple(_settled(program, waiting_for_b, waiting_for_w) for program in schedule.programs)


def _settled(program: Program, for_b: Sequence[int], for_w: Sequence[int]) -> int:
    held: dict[Task, int] = {}
    total = most = 0
    for slot in program:
        for op in slot:
            if op.kind in COMPUTE:
                size = {FORWARD: for_b[op.stage], BACKWARD: for_w[op.stage]}.get(op.kind, 0)
                total += size - held.pop(op.task, 0)
                held[op.task] = size
                most = max(most, total)
    return most


def _require_sizes(schedule: Schedule, waiting_for_b: Sequence[int], waiting_for_w: Sequence[int]) -> None:
    for name, sizes in (("waiting for B", waiting_for_b), ("waiting for W", waiting_for_w)):
        if len(sizes) != schedule.stages or min(sizes) < 0:
            raise BoundError(
                f"bytes {name} must be given for each of the {schedule.stages} stages, 0 or more",
                f"got {list(sizes)}",
                "give one size per stage",
            )


def _peak_bytes(schedule: Schedule, rank: int, for_b: Sequence[int], for_w: Sequence[int]) -> PeakBytes:
    peak = PeakBytes(rank, 0, None, ())
    held: dict[tuple[Task, Kind], int] = {}
    total = 0
    for number, slot in enumerate(schedule.programs[rank]):
        new, gone = _changes(slot, held, for_b, for_w)
        held |= new
        total += sum(new.values())
        if total > peak.total:
            now = tuple(Held(Live(Op(FORWARD, *task), until), size) for (task, until), size in held.items())
            peak = PeakBytes(rank, total, number, now)
        total -= sum(held.pop(entry) for entry in gone)
    return peak


def _changes(
    slot: Slot, held: Mapping[tuple[Task, Kind], int], for_b: Sequence[int], for_w: Sequence[int]
) -> tuple[dict[tuple[Task, Kind], int], set[tuple[Task, Kind]]]:
    """The bytes that a slot allocates, and the entries that it releases."""
    new: dict[tuple[Task, Kind], int] = {}
    gone: set[tuple[Task, Kind]] = set()
    full = full_backwards((op.kind, op.task) for op in slot)
    for op in slot:
        task = op.task
        if op.kind is FORWARD and (task, BACKWARD) not in held:
            new[task, BACKWARD] = for_b[op.stage]
        elif op.kind is BACKWARD:
            if task not in full and (task, WEIGHT) not in held:
                new[task, WEIGHT] = for_w[op.stage]
            gone.add((task, BACKWARD))
        elif op.kind is WEIGHT:
            gone.add((task, WEIGHT))
    return new, {entry for entry in gone if entry in held or entry in new}
