"""Who works with whom: the places of a rank in the pipeline, and the process groups of each stage.

Rank r of a pipeline of P holds stage r for lane > and stage P-1-r for lane <::

    pp rank      0     1     2     3
    lane >       0     1     2     3     the stage
    lane <       3     2     1     0

The gradients of a stage are reduced over both of its replicas and all data-parallel ranks at once.  Its group lists
the replica of lane > first, then that of lane <, each in data-parallel order, so that sums are added in the order in
which 1F1B with twice the data parallelism adds them.  (Before torch 2.12 a group's ranks are always sorted; then the
sums of more than two replicas may differ from 1F1B's in their last bits.)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from dualpipe.schedule import DOWN, UP, Lane

KINDS = ("dp", "dp_cp", "expt_dp")
"""Megatron's names of the groups over which gradients are reduced."""


class Position:
    """A place in the pipeline that a rank plays for its second chunk, where Megatron wants a process group.

    Megatron reads ``rank()`` and ``size()`` of a pipeline group to number layers and to place embedding and loss.  A
    real group with the ranks the other way round cannot stand beside the first one in one collection.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        """The stage, from 0."""
        return self._rank

    def size(self) -> int:
        """How many stages there are."""
        return self._size


@dataclass(frozen=True)
class Place:
    """One of the two chunks of a rank: its lane, its stage, and the groups of that stage."""

    lane: Lane
    stage: int
    collection: ProcessGroupCollection


@dataclass(frozen=True)
class Groups:
    """The groups of one rank.

    ``places`` are in order of their stage, the order in which every collective goes through the chunks on both ranks
    of a pair.  ``pair`` joins the two ranks that hold the same two stages, lane > of the lower stage first.
    """

    pipeline: dist.ProcessGroup
    pair: dist.ProcessGroup
    places: tuple[Place, Place]

    @property
    def rank(self) -> int:
        return self.pipeline.rank()

    @property
    def size(self) -> int:
        return self.pipeline.size()


def create_groups() -> Groups:
    """Create the groups of DualPipe beside Megatron's own; every process of the job calls this together.

    Needs ``parallel_state.initialize_model_parallel`` to have run.
    """
    collection = ProcessGroupCollection.use_mpu_process_groups()
    pipeline = collection.pp
    mine = {kind: dist.get_process_group_ranks(getattr(collection, kind)) for kind in KINDS}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (dist.get_process_group_ranks(pipeline), mine))
    made = _make_all(_wanted(everyone))

    rank, size = pipeline.rank(), pipeline.size()
    mirror = everyone[dist.get_process_group_ranks(pipeline)[size - 1 - rank]][1]
    places = []
    for lane, stage in sorted(((UP, rank), (DOWN, size - 1 - rank)), key=lambda place: place[1]):
        up, down = (mine, mirror) if lane is UP else (mirror, mine)
        groups = {kind: made[tuple(up[kind] + down[kind])] for kind in KINDS}
        places.append(Place(lane, stage, _collection(collection, stage, groups)))
    pair = made[_pair(dist.get_process_group_ranks(pipeline), rank)]
    return Groups(pipeline, pair, (places[0], places[1]))


def _wanted(everyone: Sequence[tuple[list[int], Mapping[str, list[int]]]]) -> list[tuple[int, ...]]:
    """The ranks of every group of the job, in an order that all processes agree on."""
    wanted: dict[tuple[int, ...], None] = {}
    for rank, (pipeline, groups) in enumerate(everyone):
        position = pipeline.index(rank)
        mirror = everyone[pipeline[len(pipeline) - 1 - position]][1]
        wanted[_pair(pipeline, position)] = None
        for kind in KINDS:
            wanted[tuple(groups[kind] + mirror[kind])] = None
    return list(wanted)


def _pair(pipeline: Sequence[int], position: int) -> tuple[int, ...]:
    lower = min(position, len(pipeline) - 1 - position)
    return pipeline[lower], pipeline[len(pipeline) - 1 - lower]


def _make_all(wanted: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
    unsorted: dict[str, Any] = (
        {"sort_ranks": False} if "sort_ranks" in inspect.signature(dist.new_group).parameters else {}
    )
    return {ranks: dist.new_group(list(ranks), group_desc="DUALPIPE_STAGE", **unsorted) for ranks in wanted}


def _collection(
    own: ProcessGroupCollection, stage: int, groups: Mapping[str, dist.ProcessGroup]
) -> ProcessGroupCollection:
    """Megatron's groups of this rank with those of the stage in place of its own."""
    changed: dict[str, object] = {
        "pp": Position(stage, own.pp.size()),
        "dp": groups["dp"],
        "dp_cp": groups["dp_cp"],
        "intra_dp_cp": groups["dp_cp"],
        "expt_dp": groups["expt_dp"],
        "intra_expt_dp": groups["expt_dp"],
    }
    return ProcessGroupCollection(**{**vars(own), **changed})
