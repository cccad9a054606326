"""The op of every collective that the ranks of a pipeline run among themselves.

On each communicator the k-th collectives of all members are one operation.  If a member calls another function there,
or passes a tensor of another type or size or the gradient of another parameter, the ops of the members get different
kinds or stages.  Then ``dualpipe prove`` refutes ``messages``, and a note names both lines of the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dualpipe.record.events import Collective, CollectiveId, ForwardId, RankLog
from dualpipe.record.lineage import Lineage
from dualpipe.record.phrases import counted
from dualpipe.schedule import Chunk, Kind, Lane, Op, Task

Key = tuple[str, tuple[int, ...]]
"""A communicator: its name, and its members."""
_REDUCES = frozenset(
    {"all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor"}
)


@dataclass(frozen=True)
class Collectives:
    """The ops of the collectives of one training step, the members of each group, and notes.

    A group has those of its members that are ranks of the pipeline.  If only one is, a reduction of gradients has no
    group, and other collectives are left out.
    """

    ops: Mapping[CollectiveId, Op]
    groups: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    step: int = 0


NONE = Collectives({}, (), ())


def name_collectives(logs: Sequence[RankLog], lineage: Lineage, step: int) -> Collectives:
    """The ops of the collectives of one training step; ``logs`` are those of all steps.

    Each communicator has those that one of its members runs between the first and the last op of the step.
    """
    rows: dict[Key, dict[int, list[Collective]]] = {}
    ops: dict[CollectiveId, Op] = {}
    left: list[Collective] = []
    chunks = _chunks(logs, lineage)
    for log in logs:
        for each in log.collectives.values():
            members = tuple(rank for rank in each.group if 0 <= rank < len(logs))
            if len(members) > 1:
                rows.setdefault((each.group_name, members), {}).setdefault(log.rank, []).append(each)
            elif each.step == step and each.within:
                chunk = chunks.get((log.rank, min(each.modules, default=-1)))
                if chunk is not None and each.name in _REDUCES:
                    ops[each.id] = Op(Kind.RG, *chunk, 0)
                else:
                    left.append(each)
    groups: list[tuple[int, ...]] = []
    notes = []
    if left:
        outside = "whose other members are outside of this pipeline"
        count = counted(len(left), f"collective {outside} is", f"collectives {outside} are")
        notes.append(f"{count} left out, as at {left[0].at}")
    for (_, members), by_rank in rows.items():
        longest = max(map(len, by_rank.values()))
        number = None
        for nth in range(longest):
            joined = {rank: row[nth] for rank, row in by_rank.items() if nth < len(row)}
            if not any(each.step == step and each.within for each in joined.values()):
                continue
            if number is None:
                number = len(groups)
                groups.append(members)
            met = _Met(joined, chunks, lineage, len(lineage.routes) > 1)
            ops |= {each.id: met.op(rank)._replace(peer=number) for rank, each in joined.items()}
            notes += [f"the members of group {number} disagree on their collective {nth + 1}: {met.clash}"] * bool(
                met.clash
            )
    return Collectives(ops, tuple(groups), tuple(notes), step)


def clashes(logs: Sequence[RankLog], pipelines: Sequence[Sequence[int]]) -> dict[int, str]:
    """Where members in different pipelines of a job disagree on the k-th collective of their group, by rank.

    The first such collective of each group, in words.  ``logs`` are those of all ranks of the job.
    """
    of_rank = {rank: number for number, own in enumerate(pipelines) for rank in own}
    rows: dict[Key, dict[int, list[Collective]]] = {}
    for log in logs:
        for each in log.collectives.values():
            if len({of_rank.get(rank, -1) for rank in each.group}) > 1:
                rows.setdefault((each.group_name, each.group), {}).setdefault(log.rank, []).append(each)
    found: dict[int, str] = {}
    for (_, members), by_rank in rows.items():
        for nth, met in enumerate(zip(*by_rank.values(), strict=False)):
            first = met[0]
            unlike = next((each for each in met if _shown(each) != _shown(first)), None)
            if unlike is not None:
                which = f"as collective {nth + 1} of the ranks {' '.join(map(str, members))}"
                for one, other in ((first, unlike), (unlike, first)):
                    theirs = f"rank {other.id.rank} of the job {_call(other)}"
                    found.setdefault(one.id.rank, f"{_call(one)} {which} of the job, where {theirs}")
                break
    return found


def _shown(each: Collective) -> tuple[object, ...]:
    """What the members of a group must agree on.  Which of the gradients a member gets is its own."""
    return each.name, each.form, frozenset(name.rpartition(".module.")[2] for name in each.names)


def _chunks(logs: Sequence[RankLog], lineage: Lineage) -> dict[tuple[int, int], Chunk]:
    """The chunk of every module that a forward of the pipeline called, or that is a part of one, by rank and number."""
    found: dict[tuple[int, int], Chunk] = {}
    for id, task in sorted(lineage.tasks.items()):
        log = logs[id.rank]
        forward = log.forwards.get(log.find(id.number))
        if forward is None:
            continue
        for module, (_, parts) in log.modules.items():
            if module == forward.module or module in log.modules[forward.module][1] or forward.module in parts:
                found.setdefault((id.rank, module), task.chunk)
    return found


class _Met:
    """The k-th collectives of a group's members, which meet."""

    def __init__(
        self,
        joined: Mapping[int, Collective],
        chunks: Mapping[tuple[int, int], Chunk],
        lineage: Lineage,
        two_lanes: bool,
    ) -> None:
        self._joined, self._chunks, self._lineage = joined, chunks, lineage
        of_gradients = {rank: self._chunk(rank) for rank, each in joined.items() if each.name in _REDUCES}
        stages = {chunk.stage for chunk in of_gradients.values() if chunk is not None}
        all_of_gradients = len(of_gradients) == len(joined) and None not in of_gradients.values()
        crossed = two_lanes and self._hold_each_other(stages) and not self._are_tied()
        self._kind = Kind.AR
        if all_of_gradients and (len(stages) == 1 or crossed):
            self._kind = Kind.RG
        elif {each.name for each in joined.values()} <= {"all_to_all", "all_to_all_single"}:
            tasks = {self._task(rank) for rank in joined}
            if None not in tasks and len({task.stage for task in tasks if task is not None}) == 1:
                self._kind = Kind.AA
        first = next(iter(joined.values()))
        self._unlike = {rank for rank, each in joined.items() if self._content(each) != self._content(first)}
        of_first = self._chunk(first.id.rank)
        self._stage_of_first = None if of_first is None else of_first.stage
        self.clash = ""
        if self._unlike or (self._kind is Kind.RG and len(stages) > 1):
            other = (
                joined[min(self._unlike)]
                if self._unlike
                else next(each for rank, each in joined.items() if self._chunk(rank) != self._chunk(first.id.rank))
            )
            one, two = (_what(each, self._chunk(each.id.rank)) for each in (first, other))
            self.clash = f"{one}, and {two}"

    def _hold_each_other(self, stages: set[int]) -> bool:
        """Whether every member holds a replica of each of the stages."""
        return all(
            any(route[stage] == rank for route in self._lineage.routes.values())
            for rank in self._joined
            for stage in stages
        )

    def _are_tied(self) -> bool:
        """Whether the members reduce gradients of tied weights: these have other names, and equal values."""
        members = list(self._joined.values())
        values = {each.values for each in members}
        return len({each.names for each in members}) > 1 and len(values) == 1 and all(values) and all(*values)

    def _content(self, each: Collective) -> tuple[object, ...]:
        return _shown(each if self._kind is Kind.RG else each._replace(names=()))

    def _chunk(self, rank: int) -> Chunk | None:
        found = [self._chunks[rank, module] for module in self._joined[rank].modules if (rank, module) in self._chunks]
        return min(found, default=None)

    def _task(self, rank: int) -> Task | None:
        context = self._joined[rank].context
        return self._lineage.tasks.get(ForwardId(rank, context[0])) if len(context) == 1 else None

    def op(self, rank: int) -> Op:
        """The op of a member.  One that differs from the first member's in anything but the stage has another kind."""
        chunk = self._chunk(rank) if self._kind is Kind.RG else None
        task = self._task(rank) if self._kind is Kind.AA else None
        if task is not None:
            return Op(Kind.AA, *task)
        kind = self._kind
        if rank in self._unlike and not (chunk and chunk.stage != self._stage_of_first):
            kind = Kind.US if kind is Kind.AR else Kind.AR
        return Op(kind, *(chunk or self._held(rank)), 0)

    def _held(self, rank: int) -> Chunk:
        """The first chunk of a rank; for a collective that belongs to no single stage."""
        for lane in Lane:
            route = self._lineage.routes.get(lane, ())
            if rank in route:
                return Chunk(lane, route.index(rank))
        lane = next(iter(self._lineage.routes))
        return Chunk(lane, 0)


def _what(each: Collective, chunk: Chunk | None) -> str:
    return f"rank {each.id.rank} {_call(each, chunk)}"


def _call(each: Collective, chunk: Chunk | None = None) -> str:
    names = [*each.names[:2], *(["..."] if len(each.names) > 2 else [])]
    at_stage = f" of stage {chunk.stage}" if chunk is not None else ""
    of = (
        f" on the gradient of {', '.join(names)}{at_stage}"
        if names
        else f" on {', '.join(each.form)}"
        if each.form
        else ""
    )
    return f"calls {each.name}{of} at {each.at}"
