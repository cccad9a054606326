"""Process groups of DualPipe: those of each stage, and the pipeline position that Megatron reads for a chunk.

``dualpipe.megatron.placement`` shows which stages a rank holds.  With one lane, Megatron's own groups are used.  With
two lanes, the gradients of a stage are reduced over both of its replicas and all data-parallel ranks at once.  The
group of the stage lists the replicas of lane > first, then those of lane <, each in data-parallel order.  So gradients
are added in the same order as by 1F1B with twice the data parallelism.  (Before torch 2.12 a group's ranks are always
sorted; then the sums of more than two replicas may differ from 1F1B's in their last bits.)

With several instances of the distributed optimizer, that list is cut into as many blocks.  The replicas of a block
share one copy of the optimizer's state, and the replicas at the same place in each block sum their shards::

    replicas of a stage     > 0   > 1   < 0   < 1       two data-parallel ranks, two lanes
    instances               `- first -´ `- second-´
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

from dualpipe.megatron.placement import Placement, placement
from dualpipe.schedule import UP, Chunk

KINDS = ("dp", "dp_cp", "expt_dp", "tp_dp_cp")
"""Megatron's names of the groups over which gradients are reduced, and experts balanced in each forward.

Both ranks of a pair run the forwards of a stage in the same order, as opposite ranks of DualPipe are mirror images.
"""
_SHARDED = {"intra_dp_cp": "dp_cp", "intra_expt_dp": "expt_dp"}
"""Megatron's names of the groups of one optimizer instance, with the names of the groups that they are parts of."""


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
def at_stage(stage: int, stages: int) -> Iterator[None]:
    """Inside the block, ``parallel_state`` gives ``stage`` as the pipeline rank and ``stages`` as the pipeline size.

    Training code often asks ``parallel_state`` for the pipeline rank instead of reading the model's process groups:
    which layers of a block are dense or mixtures of experts, where a custom layout starts, whether this is a first
    stage that needs tokens or a last one that needs labels.  So each chunk is built and run at its own stage.  No
    process group changes.  In nested blocks the inner stage applies.
    """
    rank = parallel_state._MPU_PIPELINE_MODEL_PARALLEL_RANK  # there are setters, and no getters of what was set
    size = parallel_state._MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    parallel_state.set_pipeline_model_parallel_rank(stage)
    parallel_state.set_pipeline_model_parallel_world_size(stages)
    parallel_state.set_virtual_pipeline_model_parallel_world_size(None)
    try:
        yield
    finally:
        parallel_state.set_pipeline_model_parallel_rank(rank)
        parallel_state.set_pipeline_model_parallel_world_size(size)
        parallel_state.set_virtual_pipeline_model_parallel_world_size(virtual)


@contextmanager
def building(collection: ProcessGroupCollection) -> Iterator[None]:
    """Inside the block, a module that is built without process groups gets those of ``collection``.

    Megatron passes a model's groups on to most of its modules, but not to the layer of a multi-token prediction.  Such
    a module takes the groups of the rank instead, which are those of another stage.
    """
    stock = vars(ProcessGroupCollection)["use_mpu_process_groups"]
    ProcessGroupCollection.use_mpu_process_groups = classmethod(lambda cls, required_pgs=None: collection)
    try:
        yield
    finally:
        ProcessGroupCollection.use_mpu_process_groups = stock


@dataclass(frozen=True)
class Groups:
    """The process groups of one rank.

    ``chunks`` has the groups of each of the rank's two chunks, in order of stage.  All ranks that hold a stage run
    their collectives in this order.  With two lanes, ``pair`` has the two ranks that hold the same two stages; the one
    that holds the lower stage for lane > comes first.  With one lane it is ``None``.  ``embedding`` is Megatron's group
    of the ranks with a copy of the embedding, if this rank is one of several such ranks.
    """

    placement: Placement
    pipeline: dist.ProcessGroup
    pair: dist.ProcessGroup | None
    embedding: dist.ProcessGroup | None
    chunks: Mapping[Chunk, ProcessGroupCollection]

    @property
    def rank(self) -> int:
        return self.pipeline.rank()

    @property
    def own(self) -> Chunk:
        """The chunk that Megatron's own rank would hold, or its part with this number."""
        return self.placement.own(self.rank)

    @property
    def other(self) -> Chunk:
        return self.placement.other(self.rank)

    @property
    def stages(self) -> int:
        return self.placement.stages

    @property
    def instances(self) -> int:
        """The number of instances of the distributed optimizer, over all replicas of a stage."""
        return _instances(self.chunks[self.own])

    def instance(self, chunk: Chunk) -> int:
        """The number of the instance that has the optimizer's state of a chunk of this rank."""
        return self.chunks[chunk].inter_dist_opt.rank() if self.instances > 1 else 0


def create_groups(schedule: str) -> Groups:
    """Create DualPipe's groups in addition to Megatron's own; every process of the job calls this together.

    ``parallel_state.initialize_model_parallel`` must have run.  Raises ``RuleError`` if the schedule does not run on a
    pipeline of that size.
    """
    collection = ProcessGroupCollection.use_mpu_process_groups()
    pipeline = collection.pp
    where = placement(schedule, pipeline.size())
    held = where.chunks(pipeline.rank())
    if not where.mirrored:
        chunks = {chunk: _collection(collection, chunk.stage, where.stages, embd=None) for chunk in held}
        return Groups(where, pipeline, None, _with_others(collection.embd), chunks)
    mine = {kind: dist.get_process_group_ranks(getattr(collection, kind)) for kind in KINDS}
    instances = _instances(collection)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (dist.get_process_group_ranks(pipeline), mine))
    made = _make_all(_wanted(everyone, instances))

    rank, size = pipeline.rank(), pipeline.size()
    mirror = everyone[dist.get_process_group_ranks(pipeline)[size - 1 - rank]][1]
    chunks = {}
    for chunk in held:
        up, down = (mine, mirror) if chunk.lane is UP else (mirror, mine)
        groups = {kind: made[tuple(up[kind] + down[kind])] for kind in KINDS}
        for intra, kind in _SHARDED.items():
            blocks = _blocks(up[kind] + down[kind], instances)
            groups[intra] = made[next(block for block in blocks if dist.get_rank() in block)]
        if instances > 1:
            copies = zip(*_blocks(up["expt_dp"] + down["expt_dp"], instances), strict=True)
            groups["inter_dist_opt"] = made[next(ranks for ranks in copies if dist.get_rank() in ranks)]
        embd = collection.embd if chunk.lane is UP else None
        chunks[chunk] = _collection(collection, chunk.stage, where.stages, embd=embd, **groups)
    pair = made[_pair(dist.get_process_group_ranks(pipeline), rank)]
    return Groups(where, pipeline, pair, _with_others(collection.embd), chunks)


def _with_others(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group, if this rank is in it together with others."""
    mine = group is not None and dist.get_rank() in dist.get_process_group_ranks(group) and group.size() > 1
    return group if mine else None


def _instances(own: ProcessGroupCollection) -> int:
    """The number of instances of the distributed optimizer that ``parallel_state`` was initialised with."""
    return int(own.dp_cp.size() // own.intra_dp_cp.size())


def _blocks(ranks: Sequence[int], instances: int) -> list[tuple[int, ...]]:
    """The ranks of each instance of the distributed optimizer, in order."""
    size = len(ranks) // instances
    return [tuple(ranks[start : start + size]) for start in range(0, len(ranks), size)]


def _wanted(everyone: Sequence[tuple[list[int], Mapping[str, list[int]]]], instances: int) -> list[tuple[int, ...]]:
    """The ranks of every group of the job, in the same order on all processes."""
    wanted: dict[tuple[int, ...], None] = {}
    for rank, (pipeline, groups) in enumerate(everyone):
        position = pipeline.index(rank)
        mirror = everyone[pipeline[len(pipeline) - 1 - position]][1]
        wanted[_pair(pipeline, position)] = None
        for kind in KINDS:
            blocks = _blocks(groups[kind] + mirror[kind], instances)
            wanted |= dict.fromkeys([tuple(groups[kind] + mirror[kind]), *blocks])
            if kind == "expt_dp":  # whose copies Megatron sums for all weights
                wanted |= dict.fromkeys(zip(*blocks, strict=True))
    return list(wanted)


def _pair(pipeline: Sequence[int], position: int) -> tuple[int, ...]:
    lower = min(position, len(pipeline) - 1 - position)
    return pipeline[lower], pipeline[len(pipeline) - 1 - lower]


def _make_all(wanted: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], dist.ProcessGroup]:
    unsorted: dict[str, Any] = (
        {"sort_ranks": False} if "sort_ranks" in inspect.signature(dist.new_group).parameters else {}
    )
    return {ranks: dist.new_group(list(ranks), group_desc="DUALPIPE_STAGE", **unsorted) for ranks in wanted}


def _collection(own: ProcessGroupCollection, stage: int, stages: int, **changed: object) -> ProcessGroupCollection:
    """Megatron's groups of this rank, with the position of the stage and the groups that are ``changed``.

    When a model is built, it sums its copies of the embedding over ``embd``.  A chunk without that group takes no part:
    the weights of lane < are copied from lane > afterwards, as all others are, and the two ends of a V are on one rank.
    """
    return ProcessGroupCollection(**{**vars(own), "pp": Position(stage, stages), **changed})


def groups_of_finalizing(own: ProcessGroupCollection, where: Placement) -> ProcessGroupCollection:
    """The groups for ``finalize_model_grads``, which sums copies of the embedding over ``embd``.

    The two ends of a V are on one rank, so there it is a group of one.
    """
    return own if where.mirrored else ProcessGroupCollection(**{**vars(own), "embd": Position(0, 1)})
