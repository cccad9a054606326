"""Process groups of DualPipe: those of each stage, and the pipeline position that Megatron reads for a chunk.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from dualpipe.schedule import DOWN, UP, Chunk

KINDS = ("dp", "dp_cp", "expt_dp")
"""Megatron's names of the groups over which gradients are reduced."""


class Position:
    """The pipeline position of a chunk, in place of the pipeline's process group in a ``ProcessGroupCollection``.

    Megatron reads ``rank()`` and ``size()`` of that group to number layers and to place embedding and loss.  For a
    rank's second chunk they differ from the rank's own, and a collection has room for one pipeline group.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        """The stage, from 0."""
        return self._rank

    def size(self) -> int:
        """The number of stages."""
        return self._size


@contextmanager
def at_stage(stage: int) -> Iterator[None]:
    """Inside the block, ``parallel_state.get_pipeline_model_parallel_rank()`` returns ``stage``.

    Training code often asks ``parallel_state`` for the pipeline rank instead of reading the model's process groups:
    which layers of a block are dense or mixtures of experts, where a custom layout starts, whether this is a first
    stage that needs tokens or a last one that needs labels.  So each chunk is built and run at its own stage.  No
    process group changes.  In nested blocks the inner stage applies.
    """
    before = parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK  # there is a setter, and no getter of what was set
    parallel_state.set_pipeline_model_parallel_rank(stage)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(before)


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank.

    ``chunks`` has the groups of each of the rank's two chunks, in order of stage.  Both ranks of a pair run their
    collectives in this order.  ``pair`` joins the two ranks that hold the same two stages, the one that holds the
    lower stage for lane > first.
    """

    pipeline: dist.ProcessGroup
    pair: dist.ProcessGroup
    chunks: Mapping[Chunk, ProcessGroupCollection]

    @property
    def rank(self) -> int:
        return self.pipeline.rank()

    @property
    def size(self) -> int:
        return self.pipeline.size()


def create_groups() -> Groups:
    """Create DualPipe's groups beside Megatron's own; every process of the job calls this together.

    ``parallel_state.initialize_model_parallel`` must have run.
    """
    collection = ProcessGroupCollection.use_mpu_process_groups()
    pipeline = collection.pp
    mine = {kind: dist.get_process_group_ranks(getattr(collection, kind)) for kind in KINDS}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (dist.get_process_group_ranks(pipeline), mine))
    made = _make_all(_wanted(everyone))

    rank, size = pipeline.rank(), pipeline.size()
    mirror = everyone[dist.get_process_group_ranks(pipeline)[size - 1 - rank]][1]
    chunks = {}
    for chunk in sorted((Chunk(UP, rank), Chunk(DOWN, size - 1 - rank)), key=lambda chunk: chunk.stage):
        up, down = (mine, mirror) if chunk.lane is UP else (mirror, mine)
        groups = {kind: made[tuple(up[kind] + down[kind])] for kind in KINDS}
        chunks[chunk] = _collection(collection, chunk.stage, groups)
    pair = made[_pair(dist.get_process_group_ranks(pipeline), rank)]
    return Groups(pipeline, pair, chunks)


def _wanted(everyone: Sequence[tuple[list[int], Mapping[str, list[int]]]]) -> list[tuple[int, ...]]:
    """The ranks of every group of the job, in the same order on all processes."""
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
    """Megatron's groups of this rank, with the position and the reduction groups of the stage."""
    changed: dict[str, object] = {
        "pp": Position(stage, own.pp.size()),
        "dp": groups["dp"],
        "dp_cp": groups["dp_cp"],
        "intra_dp_cp": groups["dp_cp"],
        "expt_dp": groups["expt_dp"],
        "intra_expt_dp": groups["expt_dp"],
    }
    return ProcessGroupCollection(**{**vars(own), **changed})
